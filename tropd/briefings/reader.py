"""A reader as a method prescribes it: whose model, what it is told and how it follows; or of whom it is made."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from tropd.base.ranges import Finite, Ranged, Whole
from tropd.briefings.briefing import AsStudent, Briefing
from tropd.briefings.follow import Follow, Frozen
from tropd.briefings.mixtures import Mixture, Steered, mixture_of


@dataclass(frozen=True, kw_only=True)
class Direction(Ranged):
    """Added to what a layer gives for every token while a reader reads: h + strength * d."""

    file: str
    """A .safetensors or .npy file with d alone, a vector as wide as the model's hidden states."""
    layer: Whole
    """Which layer, counted from 0. At least 0."""
    strength: Finite = 1.0
    """0 leaves the model as it is, to the last bit. Any finite number."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Somebody who reads a response and says how likely each of its tokens is."""

    model: str = "teacher"
    """"teacher": the model of the run's teacher; "start": the student before training; "student": as it is now."""
    briefing: Briefing = AsStudent()
    """What stands before the response that it reads."""
    follow: Follow = Frozen()
    """How "start" follows the student."""
    direction: Direction | None = None
    """What is added to one of the model's layers while it reads."""
    mean: tuple[str, ...] | None = None
    """It has no model but is the mean of these readers."""
    steered: Steered | None = None
    """It has no model but is one reader steered by two groups of others."""

    @property
    def made_of(self) -> Mixture | None:
        """How it is made of other readers; None if it has a model."""
        return mixture_of(self.mean, self.steered)


_MODELS = {
    "teacher": "the model of [teacher]",
    "start": "the student before training",
    "student": "the student as it is now",
    "base": "the student without its adapter",
}


def model_text(reader: Reader) -> str:
    """Whose distributions a reader gives, for people to read."""
    if reader.made_of is not None:
        return str(reader.made_of)
    direction, follow = reader.direction, reader.follow
    moves = "" if isinstance(follow, Frozen) else f", which follows the student: {follow.rule}"
    shift = f", {direction.strength:g} x {direction.file} added at layer {direction.layer}" if direction else ""
    return _MODELS.get(reader.model, reader.model) + moves + shift


def told_text(briefing: Briefing) -> str:
    """What a reader is told, for people to read."""
    if isinstance(briefing, AsStudent):
        return "what the student is told"
    given: dict[str, Any] = {f.name: getattr(briefing, f.name) for f in fields(briefing)}
    columns = f" {', '.join(map(repr, briefing.columns))}" if briefing.columns else ""
    return str(given.get("kind", type(briefing).__name__)) + columns
