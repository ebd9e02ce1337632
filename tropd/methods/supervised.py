"""SeqKD and SFT: likelihood of texts that the student did not write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.methods.policies import GivenText, RolloutPolicy, TeacherText
from tropd.objective.losses import NegativeLogLikelihood
from tropd.objective.objective import Objective
from tropd.objective.selectors import TEACHER
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class SeqKD(Method):
    r"""Sequence-level knowledge distillation: -log pi_S(x) on texts that the
    teacher (or the dataset) wrote.
    """

    name: Literal["seqkd"] = "seqkd"

    paper = "1606.07947"
    summary = "supervised training on the teacher's texts"
    idea = "who writes"
    zero_at_teacher = False

    @property
    def objective(self) -> Objective:
        return Objective(Term("likelihood", TEACHER, NegativeLogLikelihood()))

    @property
    def rollout(self) -> RolloutPolicy:
        return TeacherText()


@dataclass(frozen=True, kw_only=True)
class SFT(Method):
    r"""Supervised fine-tuning: -log pi_S(x) on the data set's responses
    (data.response_column).  Nobody teaches.
    """

    name: Literal["sft"] = "sft"

    paper = "2203.02155"
    summary = "supervised training on the data set's responses: the control of self-teaching"
    idea = "who writes"
    zero_at_teacher = False

    @property
    def objective(self) -> Objective:
        return Objective(Term("likelihood", TEACHER, NegativeLogLikelihood()))

    @property
    def rollout(self) -> RolloutPolicy:
        return GivenText()

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": Reader(model="student")}
