"""AOPD: reward where the teacher likes a token more, guidance elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Count, Range
from tropd.methods.base import Method
from tropd.objective.divergence import DivergenceLoss
from tropd.objective.losses import ForwardKL, JensenShannon, PolicyGradient, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, ProbabilityGapAbove
from tropd.objective.terms import Over, Term


@dataclass(frozen=True, kw_only=True)
class AOPD(Method):
    r"""Asymmetric on-policy distillation, mean over tokens of a sequence, then
    over sequences.

        pi_T(x) - pi_S(x) > tau  -sg[log pi_T - log pi_S] log pi_S(x)
                                 reward
        otherwise                sum_{top-k(pi_T)} pi_T log(pi_T / pi_S)
                                 guidance

    tau = -1 is OPD, tau = 1 is guidance everywhere.
    """

    name: Literal["aopd"] = "aopd"
    tau: Annotated[float, Range(at_least=-1, at_most=1)] = 0.0
    """Probability difference above which a token is rewarded (paper: 0). In [-1, 1]."""
    divergence: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    """Guidance (paper: forward KL beats the others)."""
    top_k: Count = 64
    """Teacher support; not found in the paper, 64 in TrOPD's benchmark. At least 1."""
    denominator: Over = "sequences"
    """Mean of per-sequence means (paper, eq. 10)."""

    paper = "2605.06387"
    summary = "reward where the teacher likes the token more, teacher's top-k elsewhere"
    idea = "which tokens"
    zero_at_teacher = False
    readings = (
        "The advantage is teacher against student; re-implementations that put a reference model there are wrong.",
        "Guidance applies at pi_T = pi_S too, and its truncated sum does not vanish there.",
        "Reverse KL and Jensen-Shannon guidance carry a bucket for the rest of the vocabulary: without it reverse KL "
        "on a top-k support is no divergence [inferred].",
    )

    @property
    def objective(self) -> Objective:
        better = ProbabilityGapAbove(self.tau)
        guides: dict[str, DivergenceLoss] = {
            "forward_kl": ForwardKL(support="teacher_top_k", top_k=self.top_k),
            "reverse_kl": ReverseKL(support="teacher_top_k", top_k=self.top_k, outside="bucket"),
            "jensen_shannon": JensenShannon(support="teacher_top_k", top_k=self.top_k, outside="bucket"),
        }
        return Objective(
            Term("reward", STUDENT & better, PolicyGradient(LogRatio()), over=self.denominator),
            Term("guide", STUDENT & ~better, guides[self.divergence], over=self.denominator),
        )
