"""LGR: OPD with a bonus for tokens after which the teacher is sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, Finite, NotNegative
from tropd.methods.base import Method
from tropd.methods.extras import Judge
from tropd.objective.lookahead import LookaheadBonus
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Term


@dataclass(frozen=True, kw_only=True)
class LGR(Method):
    r"""OPD with a lookahead bonus where the student is uncertain.

    log pi_T - log pi_S + gamma z(x)    where H(pi_S) > nats
    r_k  max_v pi_T(v | prefix, k) for the student's likeliest tokens k
    z    (r - mean) / std over them, 0 for a token that is not among them
    """

    name: Literal["lgr"] = "lgr"
    gamma: Finite = 1.0
    """How much the bonus counts (paper: 1; 0.1 has no effect, 10 teaches to repeat). Any finite number."""
    top_k: Count = 8
    """How many tokens are compared (paper: 8); one alone has no bonus. At least 1."""
    nats: NotNegative = 0.2
    """The student's entropy from which on a token has a bonus (paper's tau: 0.2; 10 to 25 % of tokens). At least 0."""

    paper = "2605.30833"
    summary = "OPD with a bonus for tokens after which the teacher is sure of the next one"
    idea = "whose distribution"
    zero_at_teacher = False
    readings = (
        "The teacher reads each text once more, with the tokens that are compared as branches; a family whose layers "
        "take no such mask reads a text for each of them.",
        "The deviation is divided by the number of tokens compared, and is at least 1e-4 [inferred].",
        "A written token that is not among the student's likeliest ones has no bonus [inferred].",
    )

    @property
    def objective(self) -> Objective:
        bonus = LookaheadBonus(self.gamma, self.top_k, self.nats)
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(chain(LogRatio(), bonus))))


@dataclass(frozen=True, kw_only=True)
class Lookahead(Judge):
    """LGR's bonus on the rewards of any method."""

    name: Literal["lgr"] = "lgr"
    gamma: Finite = 1.0
    """How much the bonus counts. Any finite number."""
    top_k: Count = 8
    """How many tokens are compared. At least 1."""
    nats: NotNegative = 0.2
    """The student's entropy from which on a token has a bonus. At least 0."""

    summary = "a bonus for tokens after which the teacher is sure (LGR)"
    idea = "whose distribution"

    @property
    def link(self) -> Reward:
        return LookaheadBonus(self.gamma, self.top_k, self.nats)
