"""TIP: tokens where the student is uncertain or confidently wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import PositiveShare
from tropd.methods.base import Method
from tropd.objective.losses import ReverseKL
from tropd.objective.measures import EitherHigh, Normalised, ReverseKLAt, StudentEntropy
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT, TopFraction
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class TIP(Method):
    r"""Token importance: full-vocabulary reverse KL on the best-scoring tokens,
    divided by their number.

        score = h + d - h d
        h, d = student entropy and KL(student || teacher), each brought to
        [0, 1] over the batch
    """

    name: Literal["tip"] = "tip"
    fraction: PositiveShare = 0.5
    """Share of tokens that are kept (paper: 0.5). In (0, 1]."""
    normalise: Literal["min_max", "rank"] = "min_max"
    """How both scores reach [0, 1]: min-max over the batch (paper); ranks withstand outliers."""

    paper = "2604.14084"
    summary = "full reverse KL on tokens of high entropy or high divergence"
    idea = "which tokens"
    readings = ("The soft-OR is the paper's; the released code samples tokens by another score.",)

    @property
    def objective(self) -> Objective:
        entropy, divergence = (Normalised(x, self.normalise) for x in (StudentEntropy(), ReverseKLAt()))
        important = TopFraction(EitherHigh(entropy, divergence), self.fraction)
        return Objective(Term("reverse_kl", STUDENT & important, ReverseKL(), over="members"))
