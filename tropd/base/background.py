"""Work beside this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Not in a pool: its threads would be waited for when the process ends."""
    found: Future[T] = Future()

    def carry_out() -> None:
        try:
            found.set_result(work())
        except BaseException as error:  # handed to whoever asks for the result
            found.set_exception(error)

    threading.Thread(target=carry_out, name="in the background", daemon=True).start()
    return found
