"""The Jensen-Shannon row of TrOPD's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Count, Range
from tropd.methods.base import Method
from tropd.objective.losses import ForwardKL, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, ProximalTeacher, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class JSD(Method):
    r"""Jensen-Shannon with M = beta pi_T + (1 - beta) pi_S.

    The forward part is a loss, the reverse part a reward.

        forward part  beta sum_{v in top-k(pi_T)} pi_T(v) log(pi_T(v) / pi_M(v))
        reverse part  (1 - beta) log(pi_M(x) / pi_S(x))
    """

    name: Literal["jsd"] = "jsd"
    beta: Annotated[
        float,
        Range(above=0, below=1, advice="the divergence vanishes at both ends; use 'full_fkl' (0) or 'opd' (1)"),
    ] = 0.5
    """Share of the teacher in the mixture (paper: 0.5). In (0, 1)."""
    top_k: Count = 64
    """Teacher support of the forward part (paper: 64). At least 1."""

    paper = "2606.01249"
    summary = "Jensen-Shannon: forward part on the teacher's top-k, reverse part as a reward"
    idea = "whose distribution"
    zero_at_teacher = False
    readings = ("The divergence is printed without its minus sign; it is minimised here.",)

    @property
    def objective(self) -> Objective:
        forward = ForwardKL(support="teacher_top_k", top_k=self.top_k, skew=self.beta)
        reverse = PolicyGradient(chain(LogRatio(), ProximalTeacher(self.beta)))
        return Objective(
            Term("forward", STUDENT, forward, weight=self.beta),
            Term("reverse", STUDENT, reverse, weight=1.0 - self.beta),
        )
