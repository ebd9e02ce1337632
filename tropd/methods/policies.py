"""Who writes which token of a rollout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.base.ranges import Ranged, Share, Whole
from tropd.errors import ConfigError
from tropd.objective.schedules import Schedule


class RolloutPolicy(Ranged):
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
    share: Share = 1.0
    """Share of rollouts that get a prefix at all."""
    texts: Literal["shared", "own"] = "shared"
    """One teacher text for all rollouts of a prompt, or one for each."""
    keep: Whole = 1
    """When the teacher's text would fit whole, this many of its last tokens are left to the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.length.start, self.length.end
        if not 0.0 <= min(ends) <= max(ends) <= 1.0:
            raise ConfigError(
                f"the longest prefix goes from {ends[0]:g} to {ends[1]:g} of the response budget, but a share lies in "
                "[0, 1]."
            )

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

    student_share: Share = 0.5
    coin: Literal["batch", "rollout"] = "batch"

    @property
    def needs_teacher_text(self) -> bool:
        return self.student_share < 1.0
