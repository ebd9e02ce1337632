"""GNDPO: rewards clamped, then standardised over the whole batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Positive
from tropd.methods.base import Method
from tropd.methods.extras import Judge
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, LogRatio, Standardise, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Term


@dataclass(frozen=True, kw_only=True)
class GNDPO(Method):
    r"""Globally normalised distillation: the reward of OPD, clamped and brought
    to mean 0 and deviation 1 over all of the student's tokens of the batch.

        a_t = clamp(log pi_T(x_t) - log pi_S(x_t), -clamp, clamp)
        reward  (a_t - mean a) / std a
    """

    name: Literal["gndpo"] = "gndpo"
    clamp: Positive = 5.0
    """Largest size of a reward before that, in nats (code: 5). Above 0."""
    ratio_clip: Positive = 0.2
    """PPO's clip of the importance ratio (code: verl's 0.2).  It acts from the second update of a batch on. Above 0."""

    paper = "2606.09091"
    idea = "whose distribution"
    summary = "OPD with rewards clamped and standardised over the batch"
    readings = (
        "The mean is a baseline and changes no expected gradient; the deviation rescales the learning rate; only the "
        "clamp biases.",
        "Do not put it on opd_plus, whose rewards it would rescale into those of another divergence.",
    )

    @property
    def objective(self) -> Objective:
        reward = chain(LogRatio(), Clip(-self.clamp, self.clamp), Standardise())
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(reward, clip=self.ratio_clip)))


@dataclass(frozen=True, kw_only=True)
class Whitened(Judge):
    """GNDPO's clamp and standardisation of the rewards of any method."""

    name: Literal["gndpo"] = "gndpo"
    clamp: Positive = 5.0
    """Largest size of a reward before it is standardised, in nats. Above 0."""

    idea = "whose distribution"
    summary = "GNDPO's clamp and standardisation of rewards over the batch"

    @property
    def link(self) -> Reward:
        return chain(Clip(-self.clamp, self.clamp), Standardise())
