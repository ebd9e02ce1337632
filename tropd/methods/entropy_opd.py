"""Entropy-20 %: OPD on the student's most uncertain tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import PositiveShare
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.measures import StudentEntropy
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, TopFraction
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class EntropyOPD(Method):
    r"""OPD on the tokens with the highest student entropy.

    1[H(pi_S) in the top 20 %] (log pi_T - log pi_S)
    """

    name: Literal["entropy_opd"] = "entropy_opd"
    fraction: PositiveShare = 0.2
    """Share of tokens that are kept (paper: 0.2). In (0, 1]."""
    scope: Literal["batch", "sequence"] = "batch"
    """Where the share is taken; the nearest code takes it per sequence [open]."""
    denominator: Literal["members", "actions"] = "members"
    """Divide by the kept tokens, or by all: a factor of 5 in the learning rate [inferred]."""

    paper = "2606.01249"
    summary = "OPD on the 20 % of tokens where the student is least certain"
    idea = "which tokens"
    readings = ("Neither the scope of the quantile nor the denominator is stated in the paper.",)

    @property
    def objective(self) -> Objective:
        uncertain = TopFraction(StudentEntropy(), self.fraction, self.scope)
        return Objective(Term("reverse_kl", STUDENT & uncertain, PolicyGradient(LogRatio()), over=self.denominator))
