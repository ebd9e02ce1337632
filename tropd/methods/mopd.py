"""MOPD's generalised KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, Positive
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class MOPD(Method):
    r"""Multi-teacher on-policy distillation's objective, mean over tokens of a
    sequence, then over sequences.

        direct  sum_{v in top-k(pi_T)} S log(S / T) - S + T
                never negative, zero at S = T
        reward  log pi_T - log pi_S into [-limit, limit]
    """

    name: Literal["mopd"] = "mopd"
    path: Literal["direct", "reward"] = "direct"
    """Divergence or policy gradient (paper has both)."""
    top_k: Count = 64
    """Teacher support [inferred]. At least 1."""
    limit: Positive = 5.0
    """Largest reward either way; the paper names A_max without a value [inferred]. Above 0."""

    paper = "2606.30406"
    summary = "bias-corrected reverse KL on the teacher's top-k"
    idea = "whose distribution"
    readings = ("Several teachers are a matter of routing prompts (docs/training.md), not of the objective.",)

    @property
    def objective(self) -> Objective:
        direct = ReverseKL(support="teacher_top_k", top_k=self.top_k, outside="generalised")
        reward = PolicyGradient(chain(LogRatio(), Clip(-self.limit, self.limit)))
        return Objective(Term("reverse_kl", STUDENT, direct if self.path == "direct" else reward, over="sequences"))
