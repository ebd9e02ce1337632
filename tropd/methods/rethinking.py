"""Rethinking OPD: every token of a small support is rewarded, not the drawn one alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Whole
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.support_gradient import SupportGradient
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class Rethinking(Method):
    r"""The log-ratio as the reward of each token of a support A, drawn or not.

    gradient  - sum_{v in A} w(v) (log pi_T(v) - log pi_S(v)) grad log pi_S(v)
    A         top-k of the student, of the teacher, their intersection, union
              or difference: the union without the intersection
    w         pi_S(v), pi_T(v) or 1
    """

    name: Literal["rethinking"] = "rethinking"
    support: Literal["student_top_k", "teacher_top_k", "intersection", "union", "difference"] = "student_top_k"
    """Whose likeliest tokens (code: all five; the default is [inferred])."""
    weight: Literal["student", "teacher", "none"] = "student"
    """What each token's reward is weighted by (code: student_p, teacher_p, none; the default is [inferred])."""
    top_k: Whole = 16
    """Of both models (code: 16); 0 rewards the drawn token alone, which is OPD. At least 0."""

    paper = "2604.13016"
    summary = "the log-ratio as a reward of every token of a top-k support"
    idea = "whose distribution"
    readings = (
        "With support = 'student_top_k' and weight = 'student' the gradient is that of many_faces with "
        "outside = 'stop_gradient'.",
        "Its recipe is two runs: seqkd on texts of the teacher first, on other prompts than the run with this method, "
        "with 4 rollouts of each prompt and a learning rate of 1e-6.",
    )

    @property
    def objective(self) -> Objective:
        if self.top_k == 0:
            return Objective(Term("reverse_kl", STUDENT, PolicyGradient(LogRatio())))
        loss = SupportGradient(support=self.support, top_k=self.top_k, weight=self.weight)
        return Objective(Term("reverse_kl", STUDENT, loss))
