"""Guidance: what the teacher wrote into rollouts is learnt by its likelihood, on top of any method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Positive
from tropd.errors import ConfigError
from tropd.methods.extras import Extra
from tropd.objective.losses import NegativeLogLikelihood
from tropd.objective.objective import Objective
from tropd.objective.selectors import TEACHER
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class Guidance(Extra):
    """-beta log pi_S on the tokens that the teacher, or the data set, wrote: for rollout policies that have some, such
    as phased."""

    name: Literal["guidance"] = "guidance"
    beta: Positive = 1.0
    """Weight of the likelihood; 1 counts a token of the teacher as much as one of the student [inferred]. Above 0."""

    summary = "likelihood of the tokens that the teacher wrote"
    idea = "who writes"

    def apply(self, objective: Objective) -> Objective:
        if any(term.name == "guidance" for term in objective.terms):
            raise ConfigError(
                f"{self.section}: {self.name} adds the likelihood of the teacher's tokens, but the method has it "
                "already. Set the method's own weight of it."
            )
        return Objective(*objective.terms, Term("guidance", TEACHER, NegativeLogLikelihood(), weight=self.beta))
