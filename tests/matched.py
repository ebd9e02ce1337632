"""A method whose terms read hidden states, for runs: alone, or beside a reward and a divergence."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.methods.base import Method
from tropd.objective import HiddenMatch, Objective, PolicyGradient, Term
from tropd.objective.hidden import Layers
from tropd.objective.selectors import STUDENT


@dataclass(frozen=True, kw_only=True)
class Matched(Method):
    """Hidden states of the teacher, and perhaps its log-ratio as a reward."""

    layers: Layers = "all"
    """Which layers."""
    reward: bool = True
    """Whether the log-ratio counts, too."""

    @property
    def objective(self) -> Objective:
        terms = [Term("states", STUDENT, HiddenMatch(self.layers))]
        return Objective(*terms, *([Term("reward", STUDENT, PolicyGradient())] if self.reward else []))
