"""OPD with outliers clipped or masked at a static threshold, and forward KL everywhere: TrOPD's ablations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Count, Range
from tropd.methods.base import Method, warn
from tropd.objective.losses import ForwardKL, PolicyGradient, StateReward
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT, LogRatioAbove
from tropd.objective.terms import Term

_FLOOR_READING = ("The paper gives no value for tau; REOPOLD's floor log(.1)/.9 = -2.558 is taken.",)


@dataclass(frozen=True, kw_only=True)
class ClipOutlier(Method):
    r"""OPD with the log-ratio floored.  TrOPD's tables call it REOPOLD.

    reward  max(log pi_T - log pi_S, floor)
    """

    name: Literal["clip_outlier"] = "clip_outlier"
    floor: Annotated[float, Range(at_most=0, unbounded=True)] = -2.558
    """Smallest reward [inferred]. At most 0."""

    paper = "2606.01249"
    summary = "OPD with the reward floored"
    idea = "which tokens"
    readings = _FLOOR_READING

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(chain(LogRatio(), Clip(low=self.floor)))))


@dataclass(frozen=True, kw_only=True)
class MaskOutlier(Method):
    r"""OPD on tokens with log pi_T - log pi_S > floor; the others teach nothing."""

    name: Literal["mask_outlier"] = "mask_outlier"
    floor: Annotated[float, Range(at_most=0, unbounded=True)] = -2.558
    """Log-ratio at or below which a token is dropped [inferred]. At most 0."""

    paper = "2606.01249"
    summary = "OPD with the worst tokens dropped"
    idea = "which tokens"
    readings = _FLOOR_READING

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT & LogRatioAbove(self.floor), PolicyGradient(LogRatio())))


@dataclass(frozen=True, kw_only=True)
class FullFKL(Method):
    r"""Forward KL on the teacher's top-k at every token.

    sum_{v in top-k(pi_T)} pi_T(v) log(pi_T(v) / pi_S(v))
    """

    name: Literal["full_fkl"] = "full_fkl"
    path: Literal["direct", "reward"] = "direct"
    """Differentiated through the student, or used as a reward: its expected gradient is then zero (warns)."""
    top_k: Count = 64
    """Teacher support (paper: 64). At least 1."""

    paper = "2606.01249"
    summary = "teacher's top-k forward KL at every token"
    idea = "whose distribution"
    zero_at_teacher = False
    readings = (
        "The paper reports a collapse (1.40 against 46.79). A reward that does not depend on the drawn token predicts "
        "exactly that; differentiated directly the loss trains well. Both are here.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path == "reward":
            warn(
                "method 'full_fkl' with path = 'reward': the reward does not depend on the drawn token, so its "
                "expected gradient is zero and training is noise. Use path = 'direct'."
            )

    @property
    def objective(self) -> Objective:
        loss = ForwardKL(support="teacher_top_k", top_k=self.top_k)
        return Objective(Term("forward_kl", STUDENT, StateReward(loss) if self.path == "reward" else loss))
