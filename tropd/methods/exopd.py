"""ExOPD: the student goes beyond the teacher, in the direction in which the teacher left a reference model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Finite
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.methods.extras import Judge
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Term


@dataclass(frozen=True, kw_only=True)
class ExOPD(Method):
    r"""Generalised OPD: the teacher's change against a reference model is a
    reward of its own weight.

        reward  log pi_T - log pi_S + (scale - 1) (log pi_T - log pi_ref)

    scale = 1 is OPD, between 0 and 1 the student stays between reference and
    teacher, above 1 it extrapolates.  The optimum is proportional to
    pi_T (pi_T / pi_ref)^(scale - 1).
    """

    name: Literal["exopd"] = "exopd"
    scale: Finite = 1.25
    """How much the teacher's change counts (paper: lambda, 1.25). Any finite number."""
    reference: str = "start"
    """Who is the reference: "start", the student before training (paper), or a reader with a section [readers.NAME],
    such as the teacher before its own training (paper, for a small student of a large teacher)."""

    paper = "2602.12125"
    idea = "whose distribution"
    summary = "OPD that goes beyond the teacher, away from the student before training"
    zero_at_teacher = False

    @property
    def objective(self) -> Objective:
        ratio, beyond = LogRatio(), LogRatio(self.scale - 1.0, self.reference)
        reward = ratio if self.scale == 1.0 else chain(ratio, beyond)
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(reward)))

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"start": Reader(model="start")} if self.scale != 1.0 and self.reference == "start" else {}


@dataclass(frozen=True, kw_only=True)
class Extrapolated(Judge):
    """ExOPD's extrapolation on the rewards of any method.  It needs a section [readers.NAME] of the reference."""

    name: Literal["exopd"] = "exopd"
    scale: Finite = 1.25
    """How much the teacher's change counts. Any finite number."""
    reference: str = "start"
    """The reader that the teacher is compared with."""

    idea = "whose distribution"
    summary = "ExOPD's reward for the teacher's change against a reference"

    @property
    def link(self) -> Reward:
        return LogRatio(self.scale - 1.0, self.reference)
