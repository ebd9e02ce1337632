"""SCOPE: what succeeded is imitated, what failed is distilled, each weighed by perplexity within its group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Finite, Positive
from tropd.methods.base import Method
from tropd.objective.losses import NegativeLogLikelihood, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, PerplexityWeight, Verified
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class SCOPE(Method):
    r"""SCOPE: the student's own text is imitated where it succeeded, most where
    it surprised the student, and distilled where it failed, most where the
    teacher finds it likely.

        succeeded  -w log pi_S(x_t),                    w ~ PPL_S^(1 / tau)
        failed     -w sg[log pi_T(x_t) - log pi_S(x_t)] rho_t,
                                                        w ~ PPL_T^(-1 / tau)
        the weights of a prompt's successes sum to their number, and so do
        those of its failures;    tau = temperature
    """

    name: Literal["scope"] = "scope"
    preset: Literal["paper", "code"] = "paper"
    """Successes that surprised the student count most and the sum is over all tokens (paper); or they count least and
    their likelihood is divided by their own weights, as the authors' scripts run it (code)."""
    temperature: Positive = 1.0
    """The higher, the more even the weights (code: tau, 1). Above 0."""
    success: Finite = 0.0
    """A response succeeded if its reward is above this (code: 0). Any finite number."""
    ratio_clip: Positive = 0.2
    """PPO's clip on failures (code: verl's 0.2).  It acts from the second update of a batch on. Above 0."""

    paper = "2604.10688"
    idea = "which trajectories"
    summary = "likelihood of the student's successes, OPD on its failures, weighed by perplexity in the group"
    zero_at_teacher = False
    readings = (
        "The released scripts set the sign of the student's path so that its *likely* successes count most, against "
        "the paper's text: preset = 'code'. The teacher's path is the same in both.",
        "With preset = 'code' the likelihood is divided by the weights of the successes' tokens; the code divides by "
        "the number of these tokens, which differs only as long responses weigh more or less than short ones.",
        "It needs rollout.num_rollouts above 1 (paper: 8) and a grader; a response that is alone in its path weighs 1.",
    )

    @property
    def objective(self) -> Objective:
        right, code = Verified(above=self.success), self.preset == "code"
        imitated = PerplexityWeight("student", -1 if code else 1, right, self.temperature)
        distilled = PerplexityWeight("teacher", -1, ~right, self.temperature)
        distil = PolicyGradient(LogRatio(), clip=self.ratio_clip)
        over = "members" if code else "actions"
        return Objective(
            Term("imitate", STUDENT & imitated, NegativeLogLikelihood(), over=over),
            Term("distil", STUDENT & distilled, distil),
        )
