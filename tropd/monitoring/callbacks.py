"""A user's own code at the events of a run.

    class StopAtHalf(Callback):
        def on_evaluation(self, step, numbers):
            return numbers["avg@4"] > 0.5

    train(run, callbacks=[StopAtHalf()])

What is given is a record of what has happened: to change it changes nothing.  Of several processes the first one calls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tropd.errors import ConfigError
from tropd.types import StepRecord


class Callback:
    """Override what you want to hear of.  A True stops the run after this step, with a checkpoint, as a signal does;
    what is raised ends the run at once."""

    def on_step(self, record: StepRecord) -> bool | None:
        """A step is done and recorded, its evaluation included."""

    def on_evaluation(self, step: int, numbers: Mapping[str, float]) -> bool | None:
        """The student was evaluated after so many steps; 0 is the student as it came."""

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is on the disk."""

    def on_end(self, folder: Path) -> None:
        """The run is over, finished or stopped; `folder` is the run's."""


def checked(callbacks: Any) -> Sequence[Callback]:
    """Refuse before the start what could be called at no event."""
    given = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    for one in [callback for callback in given if not isinstance(callback, Callback)]:
        said = f"the class {one.__name__}" if isinstance(one, type) else f"a {type(one).__name__}"
        raise ConfigError(f"callbacks: {said} was given. Give a list of objects of tropd.Callback.")
    return tuple(given)
