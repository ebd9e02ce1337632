"""How far the student writes: a fixed or scheduled horizon."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tropd.base.ranges import Count
from tropd.errors import ConfigError
from tropd.methods.policies import RolloutPolicy
from tropd.objective.memory import Memory
from tropd.objective.schedules import Schedule


def horizons(policy: RolloutPolicy, max_new_tokens: int, steps: int) -> list[int]:
    """The horizon of each step, as far as it is known before the run: with nothing remembered."""
    return [policy.horizon(max_new_tokens, step, step / steps, Memory()) for step in range(steps)]


@dataclass(frozen=True, kw_only=True)
class Horizon(RolloutPolicy):
    """Only the first tokens of a response are written and trained (ESR).

    >>> horizon = Horizon(tokens=100)
    >>> [horizon.horizon(most, step=0, progress=0.0, memory=Memory()) for most in (512, 60)]  # of so many at most
    [100, 60]
    """

    tokens: Count = 100
    """Tokens of a response; as many as rollout.max_new_tokens, or more, are no horizon (ESR: 100, 50 to 200 do as
    well). At least 1."""
    share: Schedule | None = None
    """Instead of `tokens`: the share of rollout.max_new_tokens, over training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share is None:
            return
        ends = (self.share.start,) if self.share.shape == "constant" else (self.share.start, self.share.end)
        if not 0.0 < min(ends) <= max(ends) <= 1.0:
            raise ConfigError(
                f"the horizon is {self.share} of the response budget, but a share above 0 and up to 1 is needed "
                "throughout: a response has at least one token."
            )

    @property
    def description(self) -> str:
        if self.share is None:
            return f"Only the first {self.tokens} tokens of a response are written and trained."
        return f"Only the first tokens of a response are written and trained, as a share of the budget: {self.share}."

    def horizon(self, max_new_tokens: int, step: int, progress: float, memory: Memory) -> int:
        if self.share is None:
            return min(self.tokens, max_new_tokens)
        return min(max_new_tokens, max(1, math.ceil(self.share(progress) * max_new_tokens - 1e-9)))
