"""KDRL: GRPO and on-policy distillation, together or one after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tropd.base.ranges import Finite, Positive, Share
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient, SampledReverseKL
from tropd.objective.objective import Objective
from tropd.objective.rewards import GroupAdvantage, LogRatio
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import STUDENT, Verified
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class KDRL(Method):
    r"""Distillation and reinforcement learning in one objective.

    grpo    -A rho_t, PPO-clipped,    A = (r - mean r) / std r in the group
    distil  weight (log pi_S(x_t) - log pi_T(x_t))^2 / 2
            whose gradient is that of weight KL(student || teacher)
    """

    name: Literal["kdrl"] = "kdrl"
    weight: Schedule = field(default_factory=lambda: Schedule(shape="linear", start=5e-3, end=1e-3))
    """Weight of the distillation (paper: annealed from 0.005 to 0.001)."""
    estimator: Literal["k2", "reward"] = "k2"
    """(log pi_S - log pi_T)^2 / 2 as a loss (paper), or log pi_T - log pi_S as a reward, clipped like GRPO's."""
    distil: Literal["all", "failures"] = "all"
    """Which responses are distilled: all, or those that failed (paper: both are studied)."""
    success: Finite = 0.0
    """A response failed if its reward is at most this [inferred]. Any finite number."""
    ratio_clip: Positive = 0.2
    """GRPO's clip [inferred]; it acts from the second update of a batch on. Above 0."""
    distil_first: Share = 0.0
    """Share of training that is distillation alone, with weight 1, before GRPO alone (2609.04108 finds that better); 0
    does both all along, with `weight` (paper). In [0, 1]."""

    paper = "2506.02208"
    idea = "which trajectories"
    summary = "GRPO plus reverse KL to the teacher, at once or one after the other"
    zero_at_teacher = False
    readings = (
        "Both terms are means over all tokens (paper). A response without others in its group has advantage 0: take "
        "rollout.num_rollouts above 1.",
        "The weight falls on a line over the whole training [inferred].",
    )

    @property
    def objective(self) -> Objective:
        clip, first = self.ratio_clip, self.distil_first
        grpo = PolicyGradient(GroupAdvantage(divide=True), clip=clip)
        distil = SampledReverseKL() if self.estimator == "k2" else PolicyGradient(LogRatio(), clip=clip)
        where = STUDENT if self.distil == "all" else STUDENT & ~Verified(above=self.success)
        later, early = 1.0, self.weight
        if first:
            later = Schedule(shape="switch", start=0.0, end=1.0, until=first)
            early = Schedule(shape="switch", start=1.0, end=0.0, until=first)
        return Objective(Term("grpo", STUDENT, grpo, weight=later), Term("distil", where, distil, weight=early))
