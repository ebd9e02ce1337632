"""Rock: OPD that leaves out tokens which training does not move."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Whole
from tropd.errors import ConfigError
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.places import Near, TokenIn
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector, Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Rock(Method):
    r"""OPD without Rock tokens: types of tokens whose divergence stays high.

    1[no token of the list within +-w of x] (log pi_T - log pi_S)
    on the list: the types v of highest R(v) = mean KL at v * frequency of v
    """

    name: Literal["rock"] = "rock"
    ids: tuple[Whole, ...] = ()
    """The list, as token ids (code: 100 types, without the 5 most frequent ones). Each at least 0."""
    tokens: tuple[str, ...] = ()
    """More of it by text, each one token, such as <think>; eos_token is the tokenizer's own [inferred]."""
    window: Whole = 0
    """How many tokens before and after one of them are left out, too (code: a knob; 0 [inferred]). At least 0."""

    paper = "2605.09253"
    summary = "OPD without the types of tokens whose divergence does not fall"
    idea = "which tokens"
    readings = (
        "The list is made before the run, of the divergences of a run that is over.",
        "The loss is divided by all tokens of the student, so leaving tokens out does not raise the others' weight "
        "[inferred].",
    )

    @property
    def objective(self) -> Objective:
        rock = Near(TokenIn(self.ids, self.tokens), self.window)
        return Objective(Term("reverse_kl", STUDENT & ~rock, PolicyGradient(LogRatio())))

    def objections(self, sampling: Sampling) -> list[str]:
        if self.ids or self.tokens:
            return []
        return ["rock has no list of tokens, so it is OPD: set method.ids or method.tokens."]


@dataclass(frozen=True, kw_only=True)
class WithoutRock(Choose):
    """Leaves listed tokens out, in any method."""

    name: Literal["rock"] = "rock"
    ids: tuple[Whole, ...] = ()
    """The list, as token ids. Each at least 0."""
    tokens: tuple[str, ...] = ()
    """More of it by text, each one token."""
    window: Whole = 0
    """How many tokens before and after are left out, too. At least 0."""

    summary = "without a list of tokens (Rock)"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        if not (self.ids or self.tokens):
            raise ConfigError("the extra rock has no list of tokens. Set its ids or its tokens.")
        return ~Near(TokenIn(self.ids, self.tokens), self.window)
