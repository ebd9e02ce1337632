"""vOPD: the exact value of a state as the baseline of OPD's reward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.methods.base import Method
from tropd.methods.extras import Judge
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, ReverseKLBaseline, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Term


@dataclass(frozen=True, kw_only=True)
class VOPD(Method):
    r"""OPD with a control variate: the reward's mean at each position, which is
    -KL(student || teacher) there, is subtracted from it.

        reward  log pi_T(x_t) - log pi_S(x_t) + KL(pi_S || pi_T)_t
    """

    name: Literal["vopd"] = "vopd"

    paper = "2605.07865"
    idea = "whose distribution"
    summary = "OPD with the exact reverse KL of each position as its reward's baseline"
    readings = (
        "The divergence is over the whole vocabulary. The paper's cheaper variant sums over the student's top-k; what "
        "is subtracted then is no longer the mean, but still changes no expected gradient.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(chain(LogRatio(), ReverseKLBaseline()))))


@dataclass(frozen=True, kw_only=True)
class KLBaseline(Judge):
    """vOPD's baseline on the rewards of any method: + KL(student || teacher) at the position."""

    name: Literal["vopd"] = "vopd"

    idea = "whose distribution"
    summary = "vOPD's baseline: rewards plus the reverse KL of their position"

    @property
    def link(self) -> Reward:
        return ReverseKLBaseline()
