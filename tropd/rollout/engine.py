"""Whoever writes tokens: the student's engine, and the teacher when it writes prefixes.

An engine of your own inherits from `Engine` and gives `generate`, and `sync` where its weights change; everything else
has a default.  docs/own_parts.md explains it, and `tropd.testing.check_engine` tests it.
"""

from __future__ import annotations

from collections.abc import Sequence

from tropd.types import Completion, Request


class Engine:
    """Writes tokens.  Batch in, batch out, order preserved; concurrency is the implementation's business."""

    context: int | None = None
    """The longest text that it holds, prompt and answer together; None where that is not known."""
    notes: Sequence[str] = ()
    """What the user should know before a run starts, such as what is slower than it could be."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request.  A request's tokens depend on its own seed, never on its neighbours."""
        raise NotImplementedError(f"{type(self).__name__} writes nothing: an engine defines `generate`.")

    def sync(self, version: int) -> None:
        """Hold the student's weights as they are now, and call them `version`.  Engines in this process share them and
        note the version; a teacher that writes does not change."""

    def rest(self) -> None:
        """Nothing is written until the next weights, so memory may be given back."""

    def close(self) -> None:
        """Give up connections and files; called once, when the run ends."""
