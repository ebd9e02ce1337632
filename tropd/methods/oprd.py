"""OPRD: the teacher's hidden states instead of its probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import NotNegative, Positive, Whole
from tropd.methods.base import Method
from tropd.objective.hidden import HiddenMatch, Layers
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.places import LastPositions, PositionBelow
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class OPRD(Method):
    r"""The mean squared difference of both models' hidden states, on what the
    student writes.

        1/L sum_l 1/H |h_S^l - h_T^m(l)|^2    over L layers of width H
        m(l)  the teacher's layer at the same share of its depth
    """

    name: Literal["oprd"] = "oprd"
    layers: Layers = "all"
    """Which layers (paper: all, last, even and odd are compared) [inferred]."""
    weight: Positive = 1.0
    """Of the difference (paper: 1; code that normalises: 100 to 1000). Above 0."""
    normalise: bool = False
    """Divide the states by their norms first (paper: no; the present code does)."""
    first: Whole = 0
    """Only the first tokens of each response (code: 50 or 2000 in ablations); 0 takes all. At least 0."""
    last: Whole = 0
    """Only the last tokens of each response (code: 50 or 2000 in ablations); 0 takes all. At least 0."""
    log_ratio: NotNegative = 0.0
    """Weight of OPD's reward beside it (paper: the states alone). At least 0."""

    paper = "2606.06021"
    summary = "mean squared difference of hidden states, layer by layer"
    idea = "whose distribution"
    readings = (
        "The paper's squared norm is H times the mean over the width that is taken here, as its code does.",
        "The paper takes states as they are, and the released code divides them by their norms: normalise = true, "
        "weight = 100 to 1000.",
        "The teacher is a model in this process, as wide as the student. The bridge between widths, a PCA basis of "
        "the teacher's states, is left out.",
    )

    @property
    def objective(self) -> Objective:
        where = STUDENT & PositionBelow(self.first) if self.first else STUDENT
        where = where & LastPositions(self.last) if self.last else where
        match = HiddenMatch(layers=self.layers, normalise=self.normalise)
        terms = [Term("hidden", where, match, weight=self.weight)]
        if self.log_ratio:
            terms.append(Term("reverse_kl", STUDENT, PolicyGradient(LogRatio()), weight=self.log_ratio))
        return Objective(*terms)
