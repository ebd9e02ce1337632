"""ESR: on-policy distillation on the first tokens alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count
from tropd.methods.base import Method
from tropd.methods.horizon import Horizon
from tropd.methods.policies import RolloutPolicy
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class ESR(Method):
    r"""Less is More: reverse KL on the first tokens of a response, and no more
    of it is written.

        t < tokens:  reward log pi_T(x_t) - log pi_S(x_t)
                     loss -rho_t sg[reward] at x_t
    """

    name: Literal["esr"] = "esr"
    tokens: Count = 100
    """The horizon; as many as rollout.max_new_tokens, or more, make it OPD (paper: 100, and 50 to 200 do as well). At
    least 1."""

    paper = "2605.27028"
    summary = "OPD on the first 100 tokens, which are all that is written"
    idea = "how far"
    readings = (
        "No code is published. Reverse KL at a token is estimated from the token that was drawn, as in `opd`, which "
        "every server can score.",
        "Any other method gets the same horizon by [[rollout.plus]] name = 'horizon'.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(LogRatio())))

    @property
    def rollout(self) -> RolloutPolicy:
        return Horizon(tokens=self.tokens)
