"""ADWIN: on-policy distillation on the first tokens, as many as the gradient needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.methods.adaptive_horizon import AdaptiveHorizon
from tropd.methods.base import Method
from tropd.methods.policies import RolloutPolicy
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class ADWIN(Method):
    r"""Adaptive windows: OPD on the first h tokens of a response, and no more
    of it is written.

        t < h:  reward log pi_T(x_t) - log pi_S(x_t)
                loss -rho_t sg[reward] at x_t
        every so many steps on whole responses, with g the gradient:
                c = cos(g of t < h, g of all t)
                c < low:  h <- min(2 h, the response budget)
    """

    name: Literal["adwin"] = "adwin"
    horizon: AdaptiveHorizon = field(default_factory=AdaptiveHorizon)
    """How h begins and moves [inferred]."""

    paper = "2605.28396"
    summary = "OPD on the first tokens, more of them where their gradient leaves that of whole responses"
    idea = "how far"
    readings = (
        "Known is the abstract alone: the horizon follows a delayed comparison of the gradients of prefix and whole "
        "response, with a control of staleness. Its rule and its numbers are inferred.",
        "The gradient of the prefix is that of its tokens within whole responses: one step gives both, in two backward "
        "passes.",
        "`tropd plan` counts whole responses in every step, since it cannot know how far the horizon grows: an upper "
        "bound.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(LogRatio())))

    @property
    def rollout(self) -> RolloutPolicy:
        return self.horizon
