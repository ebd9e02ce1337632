"""CGTR: the student's own teacher stands still until a gate opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count
from tropd.briefings.briefing import WithColumn
from tropd.briefings.follow import Gated
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.losses import ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class CGTR(Method):
    r"""Reverse KL on the student's top-k and a bucket for the rest, to a copy of
    the student that is told a solution s and stands still between copies.

        KL(S || T) on top-k and rest
        S = pi(. | x, y_<t),    T = pi_copy(. | x, s, y_<t)
        pi_copy <- pi    when enough steps have passed, the reward has risen
                         since the last copy, and answers are not too long
    """

    name: Literal["cgtr"] = "cgtr"
    column: str = "solution"
    """The data set's column with the solution that the teacher is told [inferred]."""
    top_k: Count = 20
    """Of the student's likeliest tokens [inferred]. At least 1."""
    gate: Gated = Gated()
    """When the copy is renewed (paper: steps, reward and lengths; its thresholds are inferred)."""

    paper = "2606.03532"
    summary = "reverse KL on top-k and rest to a copy of the student, renewed when a gate opens"
    idea = "what teaches"
    readings = (
        "The paper compares when the teacher moves: follow = { rule = 'copy', every = M }, with the failures that it "
        "finds for M = 1 and 2, and { rule = 'ema' } are the alternatives to the gate, as settings of [teacher].",
        "Neither the thresholds of the gate nor the loss are given in what can be read: both are inferred.",
        "It needs a grader.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(
            Term("reverse_kl", STUDENT, ReverseKL(support="student_top_k", top_k=self.top_k, outside="bucket"))
        )

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": Reader(model="start", briefing=WithColumn(column=self.column), follow=self.gate)}
