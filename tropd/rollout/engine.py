"""Whoever writes tokens: the student's engine, and the teacher when it writes prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tropd.types import Completion, Request


class Engine(Protocol):
    """Writes tokens.  Batch in, batch out, order preserved; concurrency is the implementation's business."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request.  A request's tokens depend on its own seed, never on its neighbours."""
        ...

    def sync(self, version: int) -> None:
        """Hold the student's weights as they are now, and call them `version`.  Engines in this process share them."""
        ...

    def close(self) -> None: ...
