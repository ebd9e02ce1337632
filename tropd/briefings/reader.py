"""A reader as a method prescribes it: whose model, and what it is told; or of whom it is made."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.base.ranges import Finite, Ranged, Whole
from tropd.briefings.briefing import AsStudent, Briefing
from tropd.objective.mixtures import Steered


@dataclass(frozen=True, kw_only=True)
class Direction(Ranged):
    """Added to what a layer gives for every token while a reader reads: h + strength * d."""

    file: str
    """A .safetensors or .npy file with d alone, a vector as wide as the model's hidden states."""
    layer: Whole
    """Which layer, counted from 0."""
    strength: Finite = 1.0
    """0 leaves the model as it is, to the last bit."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Somebody who reads a response and says how likely each of its tokens is."""

    model: str = "teacher"
    """"teacher": the model of the run's teacher; "start": the student before training; "student": as it is now."""
    briefing: Briefing = AsStudent()
    """What stands before the response that it reads."""
    direction: Direction | None = None
    """What is added to one of the model's layers while it reads."""
    mean: tuple[str, ...] | None = None
    """It has no model but is the mean of these readers."""
    steered: Steered | None = None
    """It has no model but is one reader steered by two groups of others."""
