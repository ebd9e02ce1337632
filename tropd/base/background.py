"""Runs work in a thread beside this one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


def in_background(work: Callable[[], T]) -> Future[T]:
    """Start `work` in a daemon thread: unlike a pool's threads, it does not keep the process alive."""
    result: Future[T] = Future()

    def carry_out() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # raised again by `result()`
            result.set_exception(error)

    threading.Thread(target=carry_out, name="in the background", daemon=True).start()
    return result
