"""TRB: rollouts from a mixture that starts near the teacher and becomes the student."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.base.ranges import Count
from tropd.methods.base import Method
from tropd.methods.joint import Blended
from tropd.methods.policies import RolloutPolicy
from tropd.objective.losses import ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import STUDENT
from tropd.objective.support import Outside
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class TRB(Method):
    r"""Trust-region behavior blending: reverse KL on the student's top-k, on texts
    that both models draw until epsilon is 0.

        x_t ~ mu,    log mu = (1 - beta) log pi_S + beta log pi_T - log Z
        beta = the largest in [0, 1] with KL(mu || pi_S) <= epsilon
    """

    name: Literal["trb"] = "trb"
    epsilon: Schedule = field(default_factory=lambda: Blended().epsilon)
    """The budget in nats of each token, over training (paper: linear from 0.001 to 0.05 down to 0 after 15, 25 or 50 of
    400 steps; the middle of each is taken)."""
    top_k: Count = 16
    """Of the student's likeliest tokens (paper: 16). At least 1."""
    outside: Outside = "stop_gradient"
    """The rest of the vocabulary [inferred]: plain truncation would have a wrong fixed point."""

    paper = "2605.31159"
    idea = "who writes"
    summary = "reverse KL on texts from a mixture within a trust region around the student"
    readings = (
        "The loss of a prefix needs no importance weight, whoever wrote the prefix, so the paper has none.",
        "A token of the mixture is the student's; its behavior log-probability is the mixture's.",
    )

    @property
    def objective(self) -> Objective:
        loss = ReverseKL(support="student_top_k", top_k=self.top_k, outside=self.outside)
        return Objective(Term("reverse_kl", STUDENT, loss))

    @property
    def rollout(self) -> RolloutPolicy:
        return Blended(epsilon=self.epsilon)
