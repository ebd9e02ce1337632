"""Extras: changes to the objective of any method, `[[method.plus]]` in a run file.

A method of the survey is often plain OPD with one more selector or reward.  As an extra, that selector or reward can be
put on any other method:

    [method]
    name = "tropd"

    [[method.plus]]
    name = "random_mask"
    share = 0.5

Extras apply one after another.  One of your own is a frozen dataclass that inherits from `Extra`, `Choose` or `Judge`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tropd.base.names import name_of
from tropd.base.ranges import Ranged
from tropd.errors import ConfigError
from tropd.methods.ideas import Idea
from tropd.objective.objective import Objective
from tropd.objective.rewards import chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Selector, Term

EXTRAS: dict[str, type[Extra]] = {}
"""tropd's own, by the names that a run file has for them."""


@dataclass(frozen=True, kw_only=True)
class Extra(Ranged):
    """A change to an objective."""

    section = "method.plus"

    name: str = ""
    """By which a run file finds it.  tropd gives an extra of your own its name."""

    summary: ClassVar[str] = ""
    """One line for `tropd explain`."""
    idea: ClassVar[Idea | None] = None
    """Under which it is listed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = vars(cls).get("name")
        if isinstance(name, str) and name and cls.__module__.startswith("tropd."):
            EXTRAS[name] = cls

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.name:
            object.__setattr__(self, "name", name_of(type(self)) or type(self).__name__)

    def apply(self, objective: Objective) -> Objective:
        """The objective with the change."""
        raise NotImplementedError(f"{type(self).__name__} changes nothing: an extra defines `apply`.")


class Choose(Extra):
    """An extra that weighs the student's tokens, in every term; other tokens keep their weights."""

    @property
    def selector(self) -> Selector:
        raise NotImplementedError(f"{type(self).__name__} chooses nothing: it defines `selector`.")

    def apply(self, objective: Objective) -> Objective:
        chosen = self.selector | ~STUDENT
        return Objective(*(replace(term, where=term.where & chosen) for term in objective.terms))


class Judge(Extra):
    """An extra that goes on from the rewards of a method: the last link of each chain."""

    @property
    def link(self) -> Reward:
        raise NotImplementedError(f"{type(self).__name__} judges nothing: it defines `link`.")

    def apply(self, objective: Objective) -> Objective:
        if all(term.loss.reward is None for term in objective.terms):
            raise ConfigError(
                f"{self.section}: {self.name} changes how written tokens are rewarded, but no term of the method has a "
                "reward. Put it on a method that has one, such as opd or tropd."
            )
        return Objective(*map(self._judged, objective.terms))

    def _judged(self, term: Term) -> Term:
        if term.loss.reward is None:
            return term
        loss: Any = term.loss
        return replace(term, loss=replace(loss, reward=chain(loss.reward, self.link)))
