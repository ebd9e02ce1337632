"""Several policies as one: `rollout.plus` in a run file, and the names of all policies.

[[rollout.plus]]
name = "horizon"
tokens = 100
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tropd.errors import ConfigError
from tropd.methods.adaptive_horizon import AdaptiveHorizon
from tropd.methods.agreement_stop import AgreementStop
from tropd.methods.decoding import Decoding
from tropd.methods.drafts import Draft, RolloutJob, Writer
from tropd.methods.horizon import Horizon
from tropd.methods.joint import Blended, Interleaved, MixedSampling
from tropd.methods.phased import Phased
from tropd.methods.policies import (
    Done,
    Mixture,
    OnPolicy,
    RolloutPolicy,
    Shares,
    TeacherPrefix,
    TeacherText,
)
from tropd.methods.replay import Replay
from tropd.objective.memory import Memory
from tropd.types import Rollout

POLICIES: dict[str, type[RolloutPolicy]] = {
    "on_policy": OnPolicy,
    "teacher_prefix": TeacherPrefix,
    "teacher_text": TeacherText,
    "mixture": Mixture,
    "horizon": Horizon,
    "adaptive_horizon": AdaptiveHorizon,
    "replay": Replay,
    "phased": Phased,
    "blended": Blended,
    "mixed_sampling": MixedSampling,
    "interleaved": Interleaved,
    "agreement_stop": AgreementStop,
}
"""By the names that a run file has for them."""


@dataclass(frozen=True, kw_only=True)
class Stacked(RolloutPolicy):
    """Several policies: one says how rollouts begin, one how tokens are drawn, and the shortest horizon counts."""

    policies: tuple[RolloutPolicy, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for what, does in (
            ("how rollouts begin", _begins),
            ("how tokens are drawn", _draws),
            ("what is used again", _repeats),
        ):
            if len(several := [p for p in self.policies if does(p)]) > 1:
                names = " and ".join(type(p).__name__ for p in several)
                raise ConfigError(f"rollout.plus: {names} both say {what}. Keep one of them.")
        if twice := [p for p in self.policies if _remembers(p) and self.memories.count(p.memory) > 1]:
            raise ConfigError(f"rollout.plus: {type(twice[0]).__name__} is there twice. Keep one of them.")

    def check(self, num_rollouts: int) -> None:
        for policy in self.policies:
            policy.check(num_rollouts)

    @property
    def _beginner(self) -> RolloutPolicy:
        return next((p for p in self.policies if _begins(p)), OnPolicy())

    @property
    def needs_teacher_text(self) -> bool:
        return self._beginner.needs_teacher_text

    @property
    def needs_grader(self) -> bool:
        return any(p.needs_grader for p in self.policies)

    @property
    def description(self) -> str:
        plain = (OnPolicy,) if len(self.policies) > 1 else ()
        return " ".join(p.description for p in self.policies if not isinstance(p, plain)) or OnPolicy().description

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        return self._beginner.begin(job, writer)

    def again(self, job: RolloutJob) -> Mapping[str, Sequence[Rollout]]:
        if self.split(job.step, job.progress, job.memory) is not None:
            return {}  # what is measured on whole responses is written anew
        return next((kept for p in self.policies if (kept := p.again(job))), {})

    @property
    def oldest(self) -> int:
        return max(p.oldest for p in self.policies)

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        return self._beginner.shares(progress, num_rollouts, max_new_tokens)

    def horizon(self, max_new_tokens: int, step: int, progress: float, memory: Memory) -> int:
        return min(p.horizon(max_new_tokens, step, progress, memory) for p in self.policies)

    def split(self, step: int, progress: float, memory: Memory) -> int | None:
        found = (p.split(step, progress, memory) for p in self.policies)
        return next((position for position in found if position is not None), None)

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        return next((p.decoding(progress, memory) for p in self.policies if p.writes_jointly), None)

    def remember(self, done: Done, memory: Memory) -> None:
        for policy in self.policies:
            policy.remember(done, memory)

    @property
    def memories(self) -> tuple[str, ...]:
        return tuple(name for p in self.policies for name in p.memories)

    @property
    def writes_jointly(self) -> bool:
        return any(p.writes_jointly for p in self.policies)


def stacked(policies: Sequence[RolloutPolicy]) -> RolloutPolicy:
    """One policy that does what they say."""
    return policies[0] if len(policies) == 1 else Stacked(policies=tuple(policies))


def _begins(policy: RolloutPolicy) -> bool:
    return type(policy).begin is not RolloutPolicy.begin


def _repeats(policy: RolloutPolicy) -> bool:
    return type(policy).again is not RolloutPolicy.again


def _remembers(policy: RolloutPolicy) -> bool:
    return type(policy).remember is not RolloutPolicy.remember


def _draws(policy: RolloutPolicy) -> bool:
    return policy.writes_jointly
