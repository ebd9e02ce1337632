"""Near-Future: OPD that does not punish a token after which student and teacher agree again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, PositiveShare, Share
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.objective.losses import PolicyGradient
from tropd.objective.near_future import FalseAlarm, FutureGap, HighLoss
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector, Term


@dataclass(frozen=True, kw_only=True)
class NearFuture(Method):
    r"""OPD with less weight on false alarms: tokens of high loss whose near future
    agrees.  The half of TOPD that suppresses.

        w (log pi_T - log pi_S)
        w  `suppress` on false alarms, 1 elsewhere
        false alarms  of the tokens with the highest log pi_S - log pi_T of each
                      response, the 30 % of the batch with the smallest gap
        gap           mean |log pi_T - log pi_S| over the next tokens
    """

    name: Literal["near_future"] = "near_future"
    candidates: Count = 50
    """High-loss tokens of each response (paper: 50; code: 3). At least 1."""
    separation: Count = 8
    """Tokens between two of them (code: 8). At least 1."""
    window: Count = 20
    """Tokens of the future (code: 20). At least 1."""
    quiet: PositiveShare = 0.3
    """Share of them that are false alarms (paper: it finds about 30 %). In (0, 1]."""
    suppress: Share = 0.0
    """Weight of a false alarm (paper: lower; 0 [inferred]). In [0, 1]."""

    paper = "2606.00305"
    summary = "OPD with less weight on high-loss tokens after which both models agree"
    idea = "which tokens"
    readings = (
        "The paper samples short futures of both models from the token before and compares them by optimal transport "
        "in embedding space. Here the student's own continuation in the rollout stands for them, since it is a sample "
        "of its future, and the gap of both models' log-probabilities on it for the distance [inferred]: no further "
        "text is written.",
        "The token itself is left out of its future, because its loss is what chose it [inferred].",
        "The released code asks for a gap above mean + 2 standard deviations of at most 3 values, the gap among them, "
        "which no value can reach; here the gap's quantile over the batch decides.",
        "Left out: the half that pulls the student towards the teacher's future where the alarm is true.",
    )

    @property
    def objective(self) -> Objective:
        calm = _calm(self.candidates, self.separation, self.window, self.quiet, self.suppress)
        return Objective(Term("reverse_kl", STUDENT & calm, PolicyGradient(LogRatio())))


def _calm(candidates: int, separation: int, window: int, quiet: float, suppress: float) -> Selector:
    if suppress == 1.0:
        return STUDENT
    high = HighLoss(candidates, separation)
    return ~FalseAlarm(high, FutureGap(window), quiet, strength=1.0 - suppress)


@dataclass(frozen=True, kw_only=True)
class WithoutFalseAlarms(Choose):
    """Less weight on high-loss tokens whose near future agrees, in any method."""

    name: Literal["near_future"] = "near_future"
    candidates: Count = 50
    """High-loss tokens of each response. At least 1."""
    separation: Count = 8
    """Tokens between two of them. At least 1."""
    window: Count = 20
    """Tokens of the future. At least 1."""
    quiet: PositiveShare = 0.3
    """Share of them that are false alarms. In (0, 1]."""
    suppress: Share = 0.0
    """Weight of a false alarm. In [0, 1]."""

    summary = "less weight on high-loss tokens whose near future agrees (Near-Future)"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        return _calm(self.candidates, self.separation, self.window, self.quiet, self.suppress)
