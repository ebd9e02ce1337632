"""A reader as a method prescribes it: whose model, what it is told, and how it follows the student."""

from __future__ import annotations

from dataclasses import dataclass

from tropd.briefings.briefing import AsStudent, Briefing
from tropd.briefings.follow import Follow, Frozen


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Somebody who reads a response and says how likely each of its tokens is."""

    model: str = "teacher"
    """"teacher": the model of the run's teacher; "start": the student before training; "student": as it is now."""
    briefing: Briefing = AsStudent()
    """What stands before the response that it reads."""
    follow: Follow = Frozen()
    """How "start" follows the student."""
