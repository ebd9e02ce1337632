"""RG-OPD: only responses that teacher and grader judge alike teach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Finite
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector, Term
from tropd.objective.verdicts import VerdictsAgree


@dataclass(frozen=True, kw_only=True)
class RGOPD(Method):
    r"""Reward-gated OPD: OPD on the responses for which the teacher's verdict,
    the sign of the summed reward, is the grader's.

        reward  a_t = log pi_T(x_t) - log pi_S(x_t)
        kept    sum_t a_t > 0 and the response succeeded,
                sum_t a_t < 0 and it failed
    """

    name: Literal["rg_opd"] = "rg_opd"
    success: Finite = 0.0
    """A response succeeded if its reward is above this [inferred]. Any finite number."""

    paper = "2607.04037"
    idea = "which trajectories"
    summary = "OPD on the responses that teacher and grader judge alike"
    readings = ("The mean is over all tokens, gated responses included [inferred].",)

    @property
    def objective(self) -> Objective:
        kept = VerdictsAgree(above=self.success)
        return Objective(Term("reverse_kl", STUDENT & kept, PolicyGradient(LogRatio())))


@dataclass(frozen=True, kw_only=True)
class VerdictGated(Choose):
    """RG-OPD's gate on the student's tokens of any method."""

    name: Literal["rg_opd"] = "rg_opd"
    success: Finite = 0.0
    """A response succeeded if its reward is above this. Any finite number."""

    idea = "which trajectories"
    summary = "RG-OPD's gate: only responses that teacher and grader judge alike"

    @property
    def selector(self) -> Selector:
        return VerdictsAgree(above=self.success)
