"""OPD+: the right advantage for any f-divergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Range
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, Divergence, DivergenceWeight, LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class OPDPlus(Method):
    r"""Policy gradient of an f-divergence D_f = E_S[f(u)].

    u = pi_T / pi_S at the token that the student drew.

        advantage       w(u) = -f(u) + u f'(u)
        forward_kl      u
        reverse_kl      log u - 1
        jensen_shannon  log((1 + u) / 2) / 2
    """

    name: Literal["opd_plus"] = "opd_plus"
    divergence: Divergence = "forward_kl"
    """Which divergence is minimised."""
    limit: Annotated[float, Range(above=0, at_most=50)] = 6.0
    """The log-ratio is brought into [-limit, limit] first (reproduction: 6). In (0, 50]."""

    paper = "2606.01039"
    summary = "unbiased sampled-token gradient of forward KL, reverse KL or Jensen-Shannon"
    idea = "whose distribution"
    zero_at_teacher = False
    readings = ("Do not whiten: it erases reverse KL's constant and rescales the weights.",)

    @property
    def objective(self) -> Objective:
        links = LogRatio(), Clip(-self.limit, self.limit), DivergenceWeight(self.divergence)
        return Objective(Term(self.divergence, STUDENT, PolicyGradient(chain(*links))))
