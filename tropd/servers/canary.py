"""A canary: a known text, whose log-probabilities show which weights a server computes with.

teacher     is it the same model as at the start?             server.canary_nats   `tropd.teachers.meeting`
student     does it have the trainer's current weights?       rollout.sync_nats    `tropd.rollout.canary`
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tropd.errors import ServerGarbled


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A known text, and its log-probabilities under the right model."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    """Of all tokens except the first; () before they are known."""

    def gaps(self, logprobs: Sequence[float]) -> list[float]:
        """Distances in nats, token by token."""
        return [abs(max(a, -1e4) - max(b, -1e4)) for a, b in zip(self.logprobs, logprobs, strict=True)]

    def check(self, logprobs: Sequence[float], nats: float) -> None:
        gaps = self.gaps(logprobs)
        gap = sum(gaps) / len(gaps)
        if not gap <= nats:
            raise ServerGarbled(
                f"another model answers than at the start: a known text of {len(self.ids)} tokens had the "
                f"log-probabilities {shown(self.logprobs)}, and now {shown(logprobs)}: {gap:.2g} nats apart on "
                f"average (server.canary_nats = {nats:g})."
            )


def shown(logprobs: Sequence[float]) -> str:
    """The first few numbers, for an error."""
    return ", ".join(f"{x:.4f}" for x in list(logprobs)[:4]) + ", ..."
