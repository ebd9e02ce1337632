"""FiRe-OPD: responses that the teacher finds unlikely are left out, tokens are weighed by both models' entropies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import NotNegative, Positive, Range
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector, Term
from tropd.objective.trajectories import BestResponses, EntropyWeight, TeacherLogprob

Drop = Annotated[float, Range(at_least=0, below=1)]
Scope = Literal["sequence", "batch"]


def _weights(drop: float, sure: float, unsure: float, scope: Scope) -> Selector:
    weight = EntropyWeight(sure, unsure, scope)
    return BestResponses(TeacherLogprob(), 1.0 - drop) & weight if drop else weight


@dataclass(frozen=True, kw_only=True)
class FiRe(Method):
    r"""FiRe-OPD: OPD on the responses that the teacher finds likely, with most
    weight on tokens where the teacher is sure and the student is not.

        weight  w / mean w,
                w = (1 + sure (1 - H_T / max H_T)) (1 + unsure H_S / max H_S)
        reward  a_t = log pi_T(x_t) - log pi_S(x_t)
        left out: the share `drop` of the batch's responses whose mean
        log pi_T(x_t) is lowest
    """

    name: Literal["fire"] = "fire"
    preset: Literal["paper", "code"] = "paper"
    """The filter of the paper, or none: the authors' scripts take the quantile of one response alone, which never drops
    it (code)."""
    drop: Drop = 0.2
    """Share of the batch's responses that are left out, rounded down (paper: 0.2). In [0, 1)."""
    sure: NotNegative = 1.0
    """How much a sure teacher counts (paper: alpha, 1). At least 0."""
    unsure: NotNegative = 1.0
    """How much an unsure student counts (paper: beta, 1). At least 0."""
    scope: Scope = "sequence"
    """Where maxima and mean are taken: in each response (paper) or in the batch."""
    ratio_clip: Positive = 0.2
    """PPO's clip of the importance ratio (code: 0.2).  It acts from the second update of a batch on. Above 0."""

    paper = "2606.02684"
    idea = "which trajectories"
    summary = "OPD without the responses that the teacher finds least likely, weighed by both entropies"
    readings = (
        "The quantile is that of the whole batch, whatever the micro-batch. The released code takes it inside a "
        "micro-batch, and its scripts set the size of one to 1: there nothing is ever left out, which is preset = "
        "'code'.",
        "Maxima and mean count all that the student wrote, also in responses that are left out, and the sum is divided "
        "by the weights of the rest (code).",
        "Several teachers are routed by [teachers.NAME] and data.teacher_column.",
    )

    @property
    def objective(self) -> Objective:
        weights = _weights(self.drop if self.preset == "paper" else 0.0, self.sure, self.unsure, self.scope)
        loss = PolicyGradient(LogRatio(), clip=self.ratio_clip)
        return Objective(Term("reverse_kl", STUDENT & weights, loss, over="members"))


@dataclass(frozen=True, kw_only=True)
class FiReWeights(Choose):
    """FiRe-OPD's filter and weights on the student's tokens of any method."""

    name: Literal["fire"] = "fire"
    drop: Drop = 0.2
    """Share of the batch's responses that are left out, rounded down. In [0, 1)."""
    sure: NotNegative = 1.0
    """How much a sure teacher counts. At least 0."""
    unsure: NotNegative = 1.0
    """How much an unsure student counts. At least 0."""
    scope: Scope = "sequence"
    """Where maxima and mean are taken: in each response or in the batch."""

    idea = "which trajectories"
    summary = "FiRe-OPD's filter of responses and weights of tokens"

    @property
    def selector(self) -> Selector:
        return _weights(self.drop, self.sure, self.unsure, self.scope)
