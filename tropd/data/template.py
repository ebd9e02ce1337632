"""Limits for chat templates, which are programs that come with a model.

jinja's sandbox, in which transformers runs them, keeps them from files and from Python's insides, but not from running
for ever: one conversation has `SECONDS` and may take `BYTES` of memory.  A power (9 ** 9 ** 9), which nothing could
interrupt, is refused before.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from tropd.errors import ConfigError

SECONDS = 10.0
BYTES = 2**30
_LOOK_SECONDS, _IDLE_SECONDS = 0.05, 2.0
_STATM = Path("/proc/self/statm")


class _TooMuch(BaseException):
    """Raised in the thread that renders; no template or filter can catch it."""


class _Watch:
    """Checks time and memory while a conversation is rendered, and stops a template that takes too much."""

    def __init__(self) -> None:
        self.lock, self.thread = threading.Lock(), None
        self.writing: dict[int, tuple[float, int]] = {}
        """Threads that write a conversation: until when, and how large the process may become."""

    def begin(self) -> None:
        with self.lock:
            self.writing[threading.get_ident()] = (time.monotonic() + SECONDS, _memory() + BYTES)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._look, name="tropd-template", daemon=True)
                self.thread.start()

    def end(self) -> None:
        with self.lock:
            if self.writing.pop(threading.get_ident(), None) is None:
                _raise_in(threading.get_ident(), None)  # it was ended, but is done: the exception must not come later

    def _look(self) -> None:
        used = time.monotonic()
        while time.monotonic() < used + _IDLE_SECONDS:
            time.sleep(_LOOK_SECONDS)
            with self.lock:
                used = time.monotonic() if self.writing else used
                memory = _memory() if self.writing else 0
                for thread, (until, most) in list(self.writing.items()):
                    if time.monotonic() > until or memory > most:
                        del self.writing[thread]
                        _raise_in(thread, _TooMuch)


_watch = _Watch()


@contextmanager
def limited() -> Iterator[None]:
    """The block ends in a ConfigError when it takes more time or memory than a conversation can need."""
    try:
        _watch.begin()
        try:
            yield
        finally:
            _watch.end()
    except _TooMuch:
        raise ConfigError(
            f"the chat template takes more than {SECONDS:g} s, or more than {BYTES >> 30} GiB of memory, to write one "
            "conversation. Mend it, or set student.tokenizer to a folder with another one."
        ) from None


def check_template(template: Any) -> None:
    """Refuse a template that raises numbers to a power."""
    for text in template.values() if isinstance(template, dict) else (template,):
        if "**" in str(text) and _has_power(str(text)):
            raise ConfigError(
                "the chat template raises a number to a power, which no conversation needs and which could take for "
                "ever. Take the ** out, or set student.tokenizer to a folder with another template."
            )


@cache
def _has_power(text: str) -> bool:
    """`a ** b`; the ** of `f(**arguments)` has nothing before it."""
    from jinja2 import Environment
    from jinja2.exceptions import TemplateError

    before = ""
    with suppress(TemplateError):  # said when it is rendered
        for _, kind, token in Environment().lex(text):
            if kind == "operator" and token == "**" and before not in ("(", ",", ""):
                return True
            before = before if kind == "whitespace" else token
    return False


def _memory() -> int:
    """Of this process, in bytes; 0 where the system does not say."""
    with suppress(OSError):
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    return 0


def _raise_in(thread: int, what: type[BaseException] | None) -> None:
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(what) if what else None)
