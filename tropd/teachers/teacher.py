"""Whoever judges tokens that it did not write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from tropd.objective.evidence import Needs
from tropd.types import Rollout, TeacherScores

TopKRows = Callable[[Tensor, Tensor], Tensor]
"""(row numbers, the teacher's log-probabilities of their written tokens) -> which of them need the top-k.  Rows are
numbered through all response tokens of the rollouts that are scored."""


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
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, rows aligned with its response tokens.

        `student_topk_ids_TJ` gives, per rollout, the [T, J] ids that STUDENT_TOPK asks to be scored.  A teacher may
        leave out the top-k of rows that `top_k_rows` does not want, with NOTHING as their log-probabilities.
        """
        ...


class RunTeacher(Teacher, Protocol):
    """A teacher as a run needs it: what is known of it beside its scores."""

    @property
    def context(self) -> int | None:
        """The longest text that it scores; None where that is not known."""
        ...

    @property
    def noise(self) -> float:
        """By how many nats it may differ from itself."""
        ...
