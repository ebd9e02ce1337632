"""SKD: the teacher writes over what it would never write."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count
from tropd.methods.base import Method
from tropd.methods.joint import Interleaved
from tropd.methods.policies import RolloutPolicy
from tropd.objective.divergence import DivergenceLoss
from tropd.objective.losses import ForwardKL, JensenShannon, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT, TEACHER
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class SKD(Method):
    r"""Speculative knowledge distillation: a divergence over the whole vocabulary
    on texts that both models write.

        x_t ~ pi_S;  if x_t is not in top-k(pi_T):  x_t ~ pi_T instead
        loss  KL(pi_T || pi_S)  at every token
    """

    name: Literal["skd"] = "skd"
    top_k: Count = 25
    """How many of the teacher's likeliest tokens stand (paper: 25); 1 is nearly the teacher's text, the whole
    vocabulary the student's. At least 1."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Which divergence [inferred; the paper's algorithm takes any]; jsd is Jensen-Shannon at 0.5."""

    paper = "2410.11325"
    idea = "who writes"
    summary = "divergence on texts whose unlikely tokens the teacher replaces as they are written"

    @property
    def objective(self) -> Objective:
        losses: dict[str, DivergenceLoss] = {
            "forward_kl": ForwardKL(),
            "reverse_kl": ReverseKL(),
            "jsd": JensenShannon(),
        }
        return Objective(Term(self.divergence, STUDENT | TEACHER, losses[self.divergence]))

    @property
    def rollout(self) -> RolloutPolicy:
        return Interleaved(top_k=self.top_k)
