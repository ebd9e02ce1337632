"""Engines write tokens: the student's engine, and the teacher when it writes prefixes.

An engine of your own inherits from `Engine` and gives `generate`, `prepare` where it writes as the student, and `sync`
where it holds weights of its own; everything else has a default.  docs/own_parts.md explains it, and
`tropd.testing.check_engine` tests it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd.types import Completion, Request


class Engine:
    """Writes tokens.  Batch in, batch out, in order; concurrency is up to the implementation."""

    context: int | None = None
    """The longest text that it can hold, prompt and answer together; None if unknown."""
    notes: Sequence[str] = ()
    """Notes for the user before a run starts, for instance on slow paths."""

    def prepare(self, student: Any, tokenizer: Any, vocab_size: int) -> None:
        """Called once before the first request, for an engine that a run file names.  `student` is the model of this
        process that is trained: its weights are the current ones whenever the engine is asked to write."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request.  A request's tokens depend on its own seed, never on its neighbours."""
        raise NotImplementedError(f"{type(self).__name__} writes nothing: an engine defines `generate`.")

    def sync(self, version: int) -> None:
        """Use the student's current weights from here on, under the name `version`.  Engines in this process share the
        weights and only note the version; a teacher that writes does not change."""

    def rest(self) -> None:
        """The engine writes nothing until the next weights, so it may free memory."""

    def close(self) -> None:
        """Close connections and files; called once, when the run ends."""
