"""A horizon that grows where the first tokens no longer say what the whole response would teach."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tropd.base.ranges import Count, PositiveShare, Share, Whole
from tropd.errors import ConfigError
from tropd.methods.policies import Done, RolloutPolicy
from tropd.objective.memory import Memory
from tropd.types import Author


@dataclass(frozen=True, kw_only=True)
class AdaptiveHorizon(RolloutPolicy):
    """Only the first tokens of a response are written and trained; every so many steps a whole rollout measures whether
    they are enough (ADWIN).  The measure is c = cos(gradient of the tokens within the horizon, gradient of all).

        c >= high    the horizon becomes shrink * horizon, at least `tokens`
        c < low      it becomes 2 * horizon, at most rollout.max_new_tokens, and stays there

    >>> [AdaptiveHorizon().following(100, cosine, most=512) for cosine in (0.99, 0.9, 0.5)]
    [100, 100, 200]
    """

    tokens: Count = 100
    """[inferred] The horizon at first. At least 1."""
    every: Count = 10
    """[inferred] Steps from one whole rollout to the next; the first step is one. At least 1."""
    low: Share = 0.8
    """[inferred] A cosine below this doubles the horizon. In [0, 1]."""
    high: Share = 0.95
    """[inferred] A cosine of at least this shrinks it. In [0, 1]."""
    shrink: PositiveShare = 1.0
    """[inferred] What a horizon is multiplied with that was more than enough; 1 holds it. In (0, 1]."""
    max_age: Whole = 4
    """[inferred] A measurement on rollouts that were written more steps ago is ignored. At least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low > self.high:
            raise ConfigError(
                f"the adaptive horizon grows below a cosine of {self.low:g} (low) and shrinks from {self.high:g} on "
                "(high). Give a `low` that is at most `high`."
            )

    @property
    def description(self) -> str:
        shrinks = f", and shrinks to {self.shrink:.0%} where it is {self.high:g} or more" if self.shrink < 1 else ""
        return (
            f"Only the first tokens of a response are written and trained: {self.tokens} at first. Every {self.every} "
            "steps a whole response measures the cosine of their gradient with that of all tokens: the horizon doubles "
            f"where it is below {self.low:g}{shrinks}."
        )

    def horizon(self, max_new_tokens: int, step: int, progress: float, memory: Memory) -> int:
        return max_new_tokens if step % self.every == 0 else min(self._tokens(memory), max_new_tokens)

    def split(self, step: int, progress: float, memory: Memory) -> int | None:
        return self._tokens(memory) if step % self.every == 0 else None

    def remember(self, done: Done, memory: Memory) -> None:
        cosine = done.probes.get("gradient/cosine")
        if cosine is None:
            return
        ages = [done.step - r.policy_version[0] for r in done.rollouts if Author.STUDENT in r.authors]
        if int(done.world.gather(torch.tensor([max(ages, default=0)])).max()) <= self.max_age:
            following = self.following(self._tokens(memory), cosine, done.max_new_tokens)
            memory.put(f"{self.memory}/tokens", following)

    def following(self, tokens: int, cosine: float, most: int) -> int:
        """The horizon after a measurement at a horizon of `tokens`."""
        if cosine < self.low:
            return min(2 * tokens, most)
        return max(int(self.shrink * tokens), min(self.tokens, tokens)) if cosine >= self.high else tokens

    def _tokens(self, memory: Memory) -> int:
        return int(memory.number(f"{self.memory}/tokens", self.tokens))
