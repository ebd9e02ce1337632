"""TrOPD with AOPD's objective added."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.methods.base import Method
from tropd.methods.policies import RolloutPolicy
from tropd.methods.tropd import TrOPD
from tropd.objective.losses import ForwardKL, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, Everywhere, ProbabilityGapAbove, TrustRegion
from tropd.objective.terms import Selector, Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class TrOPDPlusAOPD(Method):
    r"""TrOPD plus one term of AOPD (table 6: "adding the AOPD objective for the
    AOPD positive samples").

        R1  pi_T > pi_S:   -sg[log pi_T - log pi_S] log pi_S(x)
                           a second copy of the reward
        R2  pi_T <= pi_S:  sum_{top-k} pi_T log(pi_T / pi_S)
                           guidance wherever AOPD's gate is open
        R3  the two gates joined by OR decide between loss and reward
    """

    name: Literal["tropd_aopd"] = "tropd_aopd"
    reading: Literal["R1", "R2", "R3"] = "R2"
    """Which reading of the table's caption [inferred]."""
    guide_outliers: bool = True
    """With R2: whether the added guidance covers outliers too, whose forward KL then counts twice (the sum that the
    caption describes, inferred); false adds it to trusted tokens alone."""
    tropd: TrOPD = field(default_factory=TrOPD)
    """The TrOPD that is added to."""

    paper = "2606.01249"
    summary = "TrOPD plus AOPD's guidance on tokens that the teacher finds less likely"
    idea = "which tokens"
    zero_at_teacher = False
    readings = (
        "R1 is the caption's letter (a positive token is one with a positive advantage); R2 is the only reading that "
        "adds a signal; R3 equals AOPD's gate under TrOPD's prefixes, since every outlier has pi_T < pi_S.",
        "Every outlier has pi_T < pi_S, so R2 gives it TrOPD's forward KL and AOPD's, because the caption adds one "
        "objective to the other. guide_outliers = false counts it once.",
    )

    @property
    def objective(self) -> Objective:
        base = {term.name: term for term in self.tropd.objective.terms}
        over, better = self.tropd.denominator, ProbabilityGapAbove(0.0)
        guide = ForwardKL(support="teacher_top_k", top_k=self.tropd.top_k)
        if self.reading == "R1":
            extra = Term("aopd_reward", STUDENT & better, PolicyGradient(LogRatio()), over=over)
        elif self.reading == "R2":
            extra = Term("aopd_guide", STUDENT & ~better & self._guided, guide, over=over)
        else:
            base.pop("outlier", None)
            base["trusted"] = Term("trusted", STUDENT & better, PolicyGradient(LogRatio()), over=over)
            extra = Term("outlier", STUDENT & ~better, guide, over=over)
        return Objective(*base.values(), extra)

    @property
    def _guided(self) -> Selector:
        tropd = self.tropd
        return Everywhere() if self.guide_outliers else TrustRegion(tropd.trust, tropd.trust_threshold)

    @property
    def rollout(self) -> RolloutPolicy:
        return self.tropd.rollout

    def objections(self, sampling: Sampling) -> list[str]:
        return self.tropd.objections(sampling)
