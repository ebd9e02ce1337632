"""Whoever judges tokens that it did not write."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from tropd.objective.evidence import Needs
from tropd.types import Rollout, TeacherScores


class Teacher(Protocol):
    """Scores rollouts.  `capabilities` is checked against the method's needs before the first step."""

    capabilities: Needs

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, rows aligned with its response tokens.

        `student_topk_ids_TJ` gives, per rollout, the [T, J] ids that STUDENT_TOPK asks to be scored.
        """
        ...
