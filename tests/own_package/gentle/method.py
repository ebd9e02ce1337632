"""OPD with a reward that is bounded on both sides."""

from __future__ import annotations

from dataclasses import dataclass

from tropd import Method, Objective, Term
from tropd.base.ranges import Positive
from tropd.objective.losses import PolicyGradient
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT

from .bounds import WIDEST


@dataclass(frozen=True, kw_only=True)
class Gentle(Method):
    """OPD with |log pi_T - log pi_S| <= bound."""

    bound: Positive = WIDEST
    """The largest reward, and the smallest with a minus."""

    summary = "OPD with a reward that is bounded on both sides"

    @property
    def objective(self) -> Objective:
        return Objective(Term("gentle", STUDENT, PolicyGradient(chain(LogRatio(), Clip(-self.bound, self.bound)))))
