"""A run's parts, loaded and looked over: what training and scoring begin with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tropd.config.run import Run
from tropd.distributed.ranks import ALONE, Ranks
from tropd.doctor import quick_checks
from tropd.teachers.local import LocalTeacher
from tropd.training.assembly import Parts, load_parts


def assemble(run: Run, directory: Path, world: Ranks = ALONE) -> Parts:
    """Everything that can be refused is refused here; what is merely odd is among the notes."""
    parts = load_parts(run, directory, world)
    parts = dataclasses.replace(parts, notes=(*parts.notes, *quick_checks(parts)))
    if world.size > 1 and run.parallel.teacher == "sharded" and isinstance(parts.teacher, LocalTeacher):
        parts.teacher.shard(world)  # after the checks, which read whole weights
        parts.learner.margin = None  # the ranks ask it together, so one of them cannot ask again
    return parts
