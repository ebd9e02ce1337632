"""Who writes which token of a rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.errors import ConfigError
from tropd.objective.schedules import Schedule


class RolloutPolicy:
    """What a method asks of the rollout stage.  Plain data: `tropd.rollout.stage` carries it out."""

    @property
    def needs_teacher_text(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class OnPolicy(RolloutPolicy):
    """The student writes everything."""


@dataclass(frozen=True, kw_only=True)
class TeacherPrefix(RolloutPolicy):
    """The teacher writes the first tokens of a response, the student goes on from there (TrOPD)."""

    length: Schedule = field(default_factory=lambda: Schedule(shape="cosine", start=1.0, end=0.0))
    """Longest prefix, as a share of the response budget, over training."""
    draw: Literal["longest", "uniform"] = "longest"
    """Each prefix as long as allowed, or uniformly between 0 and that."""
    share: float = 1.0
    """Share of rollouts that get a prefix at all."""
    texts: Literal["shared", "own"] = "shared"
    """One teacher text for all rollouts of a prompt, or one for each."""
    keep: int = 1
    """When the teacher's text would fit whole, this many of its last tokens are left to the student."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.share <= 1.0:
            raise ConfigError(f"the share of rollouts with a prefix lies in [0, 1], not {self.share}.")
        if self.keep < 0:
            raise ConfigError(f"prefix_keep is a number of tokens, not {self.keep}.")

    @property
    def needs_teacher_text(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class TeacherText(RolloutPolicy):
    """The teacher (or the dataset) writes everything: offline distillation."""

    @property
    def needs_teacher_text(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class Mixture(RolloutPolicy):
    """Each batch (or rollout) is the student's with probability `student_share`, else the teacher's (GKD's lambda)."""

    student_share: float = 0.5
    coin: Literal["batch", "rollout"] = "batch"

    def __post_init__(self) -> None:
        if not 0.0 <= self.student_share <= 1.0:
            raise ConfigError(f"the student's share of a mixture lies in [0, 1], not {self.student_share}.")

    @property
    def needs_teacher_text(self) -> bool:
        return self.student_share < 1.0
