"""Whoever writes tokens: the student's engine, and the teacher when it writes prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tropd.types import Completion, Request


class Engine(Protocol):
    """Writes tokens.  Batch in, batch out, order preserved; concurrency is the implementation's business."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request.  A request's tokens depend on its own seed, never on its neighbours."""
        ...

    def sync(self, weights: Any, version: int) -> None:
        """Hold these weights from now on.  In-process engines share the trainer's and only note the version."""
        ...

    def close(self) -> None: ...
