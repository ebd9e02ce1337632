"""Controls: extras that mask, cut or weigh without looking, for fair comparisons.

A method that drops tokens or weighs them is compared with the same method and as many tokens at random; published gains
of this kind often vanish against that.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from tropd.base.ranges import Count, PositiveShare
from tropd.methods.extras import Choose, Extra
from tropd.objective.controls import AtRandom, RandomWindow, Shuffled
from tropd.objective.objective import Objective
from tropd.objective.places import PositionBelow
from tropd.objective.selectors import TopFraction
from tropd.objective.terms import Selector


@dataclass(frozen=True, kw_only=True)
class RandomMask(Choose):
    """A share of the student's tokens of each batch, drawn at random, rounded up."""

    name: Literal["random_mask"] = "random_mask"
    share: PositiveShare
    """How much is kept. In (0, 1]."""

    summary = "control: a random share of the student's tokens"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        return TopFraction(AtRandom(), self.share)


@dataclass(frozen=True, kw_only=True)
class RandomlyPlacedWindow(Choose):
    """So many tokens in a row of each response, from a random place."""

    name: Literal["random_window"] = "random_window"
    length: Count
    """In tokens. At least 1."""

    summary = "control: a random window of each response"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        return RandomWindow(self.length)


@dataclass(frozen=True, kw_only=True)
class FirstWindow(Choose):
    """The first tokens of each response."""

    name: Literal["first_window"] = "first_window"
    length: Count
    """In tokens. At least 1."""

    summary = "control: the first tokens of each response"
    idea = "which tokens"

    @property
    def selector(self) -> Selector:
        return PositionBelow(self.length)


@dataclass(frozen=True, kw_only=True)
class ShuffledWeights(Extra):
    """The method's own weights, dealt at random to the student's tokens of the batch: the same in all terms."""

    name: Literal["shuffled_weights"] = "shuffled_weights"

    summary = "control: the method's own weights on random tokens"
    idea = "which tokens"

    def apply(self, objective: Objective) -> Objective:
        return Objective(*(replace(term, where=Shuffled(term.where)) for term in objective.terms))
