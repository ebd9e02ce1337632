"""EOPD: forward KL added where the teacher is uncertain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, NotNegative, Positive
from tropd.methods.base import Method
from tropd.objective.losses import ForwardKL, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT, TeacherEntropyAbove
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class EOPD(Method):
    r"""Entropy-aware on-policy distillation.

    The second term is added; it does not replace the first.

        all tokens           PPO-clipped reward  log pi_T - log pi_S
        H(pi_T) > threshold  + weight * sum_{top-k(pi_T)} q log(q / pi_S)
                             q = pi_T renormalised there
    """

    name: Literal["eopd"] = "eopd"
    threshold: NotNegative = 0.8
    """Teacher entropy in nats above which the second term applies (paper: 0.8). At least 0."""
    weight: NotNegative = 1.0
    """Of the second term (paper: alpha = 1). At least 0."""
    top_k: Count = 16
    """Teacher support (paper: 16; the code's example: 32). At least 1."""
    teacher_renormalised: bool = True
    """Teacher's top-k weights sum to 1 (paper, eq. 10); an audit says the code does not [open]."""
    ratio_clip: Positive = 0.2
    """PPO clip; not stated, verl's default [inferred].  It acts from the second update of a batch on. Above 0."""

    paper = "2603.07079"
    summary = "OPD plus forward KL where the teacher's entropy is high"
    idea = "which tokens"
    zero_at_teacher = False
    readings = (
        "Summaries say that the loss switches to forward KL; the paper's equation adds it.",
        "The clip does nothing in the first update after a rollout, where the ratio is 1, and by default a run makes "
        "one update per batch. The paper makes 4 (batches of 128 in parts of 32): optimizer.num_updates = 4.",
        "Both terms are divided by all trained tokens, not by the gated ones.",
        "Needs the entropy of the teacher's whole distribution: a server that returns top-k only cannot supply it.",
    )

    @property
    def objective(self) -> Objective:
        outside = "renormalise_teacher" if self.teacher_renormalised else "ignore"
        forward = ForwardKL(support="teacher_top_k", top_k=self.top_k, outside=outside)
        return Objective(
            Term("reverse_kl", STUDENT, PolicyGradient(LogRatio(), clip=self.ratio_clip)),
            Term("uncertain", STUDENT & TeacherEntropyAbove(self.threshold), forward, weight=self.weight),
        )
