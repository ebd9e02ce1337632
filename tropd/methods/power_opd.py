"""PowerOPD: a reward made of powers of probabilities, which is bounded by nature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Positive
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.power import PowerDifference
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class PowerOPD(Method):
    r"""OPD with powers of probabilities in place of logarithms: no reward
    leaves [-1, 1].

        reward  a_t = pi_T(x_t)^alpha - pi_S(x_t)^alpha

    Its expected gradient is that of a density power divergence, which is
    KL(student || teacher) in the limit: a_t / alpha -> log pi_T - log pi_S.
    """

    name: Literal["power_opd"] = "power_opd"
    alpha: Positive = 5.0
    """The larger, the more only likely tokens count (code: 5); towards 0, OPD with small rewards. Above 0."""

    paper = "2606.17199"
    idea = "whose distribution"
    summary = "OPD whose reward is the difference of powers of both probabilities"
    readings = (
        "Rewards are small where both models find a token unlikely, the more so the larger alpha is: the learning rate "
        "that suits OPD is too low here.",
        "The authors' script leaves out the token that ends a response; here it is rewarded like the others.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("power", STUDENT, PolicyGradient(PowerDifference(self.alpha))))
