"""TA-OPD: OPD on the few tokens where the student can learn something."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, PositiveShare
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, TopFraction
from tropd.objective.teachability import Teachability
from tropd.objective.terms import Selector, Term


@dataclass(frozen=True, kw_only=True)
class TAOPD(Method):
    r"""OPD on the most teachable tokens, divided by their number.

    1[D~ C~ in the top 5 %] (log pi_T - log pi_S)
    D  KL(pi_T || pi_S), renormalised on the union of both top-k
    C  the teacher's mass on the student's top-k
    ~  (x - Q05) / (Q95 - Q05) over the batch, cut to [0, 1]
    """

    name: Literal["ta_opd"] = "ta_opd"
    fraction: PositiveShare = 0.05
    """Share of tokens that are kept (paper: 0.05). In (0, 1]."""
    top_k: Count = 16
    """Of both models (reproduction: 16). At least 1."""
    denominator: Literal["members", "actions"] = "members"
    """Divide by the kept tokens, or by all: a factor of 20 in the learning rate [inferred]."""

    paper = "2605.26844"
    summary = "OPD on the 5 % of tokens that differ most within the student's reach"
    idea = "which tokens"
    readings = (
        "A reproduction's reading: the authors' code could not be read. Its loss is OPD's, the divergence of the two "
        "models as an advantage; the score only chooses tokens.",
        "A token whose score is 0 is never kept, so fewer than 5 % are, where fewer score above 0.",
    )

    @property
    def objective(self) -> Objective:
        kept = TopFraction(Teachability(self.top_k), self.fraction, least=0.0)
        return Objective(Term("reverse_kl", STUDENT & kept, PolicyGradient(LogRatio()), over=self.denominator))


@dataclass(frozen=True, kw_only=True)
class Teachable(Choose):
    """TA-OPD's choice of tokens, for any method."""

    name: Literal["ta_opd"] = "ta_opd"
    fraction: PositiveShare = 0.05
    """Share of the student's tokens that are kept. In (0, 1]."""
    top_k: Count = 16
    """Of both models. At least 1."""

    summary = "the student's most teachable tokens (TA-OPD)"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        return TopFraction(Teachability(self.top_k), self.fraction, least=0.0)
