"""DistiLLM: a divergence to a mixture of both models, bounded where one of them gives a token nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tropd.base.ranges import Range
from tropd.methods.base import Method
from tropd.methods.policies import RolloutPolicy
from tropd.methods.replay import Replay
from tropd.objective.losses import ForwardKL, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT, TEACHER
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class DistiLLM(Method):
    r"""Skew KL over the whole vocabulary.

    skew_reverse  KL(pi_S || a pi_S + (1 - a) pi_T)
    skew_forward  KL(pi_T || a pi_T + (1 - a) pi_S)
    """

    name: Literal["distillm"] = "distillm"
    divergence: Literal["skew_reverse", "skew_forward"] = "skew_reverse"
    """Which of both (paper: both; the default is [inferred])."""
    skew: Annotated[float, Range(at_least=0, below=1)] = 0.1
    """The paper's alpha (paper: 0.1); 0 is reverse or forward KL. In [0, 1)."""

    paper = "2402.03898"
    summary = "skew reverse or forward KL: against a mixture of both models, which bounds it"
    idea = "whose distribution"
    readings = (
        "The paper trains on the student's own texts of earlier steps more and more as training goes on. Here a share "
        "of the prompts is answered by texts of up to eight steps ago [inferred]; rollout.policy = 'on_policy' writes "
        "every batch anew.",
        "Texts of the teacher or the data set, where a policy brings some, are trained on like the student's.",
    )

    @property
    def objective(self) -> Objective:
        kind = ReverseKL if self.divergence == "skew_reverse" else ForwardKL
        return Objective(Term(self.divergence, STUDENT | TEACHER, kind(skew=self.skew)))

    @property
    def rollout(self) -> RolloutPolicy:
        return Replay()
