"""REOPOLD: floored reward, then the student's uncertain tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Between, PositiveShare, Range, Share
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.measures import StudentEntropy
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT, FromProgress, LogRatioAbove, TopFraction
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class REOPOLD(Method):
    r"""Relaxed on-policy distillation, divided by the number of selected tokens.

    stages = 1 keeps every token and only floors the reward.

        reward       max(log pi_T - log pi_S, floor)
                     floor = log(mixture) / (1 - mixture)
        exploration  progress < switch:
                     only tokens with log pi_T - log pi_S >= floor
        refinement   after that: only the `fraction` of the batch's tokens
                     with the highest student entropy
    """

    name: Literal["reopold"] = "reopold"
    stages: Literal[1, 2] = 2
    """2 is the paper's method; TrOPD's tables call 1 "REOPOLD" and 2 "REOPOLD 2Stage"."""
    mixture: Between = 0.1
    """The paper's lambda; re-implementations quote 0.1 as the default, others 0.2 or 0.3 [open]. In (0, 1)."""
    floor: Annotated[float, Range(at_most=0, unbounded=True)] | None = None
    """Smallest reward; by default from `mixture`. At most 0."""
    bracket: Literal["outside", "inside"] = "outside"
    """log(lambda) / (1 - lambda), which the derivation gives, or log(lambda / (1 - lambda)) [open]."""
    switch: Share = 0.5
    """Progress at which refinement begins (paper: 150 of 300 steps). In [0, 1]."""
    fraction: PositiveShare = 0.2
    """Share of tokens in refinement (paper: 0.2). In (0, 1]."""

    paper = "2603.11137"
    summary = "floored reward; first without the worst tokens, then on the uncertain ones"
    idea = "which tokens"
    readings = (
        "In exploration a token below the floor is dropped, so the floor itself only acts in refinement.",
        "Eq. 7's brackets are read both ways; log(l + (1 - l) r) >= (1 - l) max(log r, log(l) / (1 - l)) decides.",
    )

    @property
    def smallest_reward(self) -> float:
        if self.floor is not None:
            return self.floor
        rest = 1.0 - self.mixture
        return math.log(self.mixture) / rest if self.bracket == "outside" else math.log(self.mixture / rest)

    @property
    def objective(self) -> Objective:
        floor = self.smallest_reward
        loss = PolicyGradient(chain(LogRatio(), Clip(low=floor)))
        if self.stages == 1:
            return Objective(Term("reverse_kl", STUDENT, loss))
        explore, refine = LogRatioAbove(floor, inclusive=True), TopFraction(StudentEntropy(), self.fraction)
        where = STUDENT & FromProgress(explore, refine, self.switch)
        return Objective(Term("reverse_kl", where, loss, over="members"))
