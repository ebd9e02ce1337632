"""Signals: the first lets the step finish, the second stops the run at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tropd.distributed.ranks import Ranks
from tropd.monitoring.display import Display
from tropd.run.state import State

_ECHO = 2.0
"""Seconds in which a launcher may repeat a signal that the terminal has already sent to every process."""


@contextmanager
def stop_on_signals(state: State, shown: Display, world: Ranks) -> Iterator[None]:
    """The first SIGINT or SIGTERM lets the step finish and saves; a second SIGINT stops at once."""
    since = time.monotonic()

    def ask(number: int, frame: Any) -> None:
        nonlocal since
        if state.asked and number == signal.SIGINT and (world.size == 1 or time.monotonic() - since > _ECHO):
            raise KeyboardInterrupt
        if not state.asked:
            since, state.asked, state.signal = time.monotonic(), True, number
            with suppress(RuntimeError):  # it came while a line was being written, and that one cannot be broken
                shown.note("stopping after this step; interrupt again to stop at once")

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not in the main thread, which alone may handle signals
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
