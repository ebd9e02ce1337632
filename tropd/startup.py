"""A run's parts, loaded and looked over: what training and scoring begin with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from tropd.assembly import Parts, load_parts
from tropd.config import Run
from tropd.doctor import quick_checks


def assemble(run: Run, directory: Path) -> Parts:
    """Everything that can be refused is refused here; what is merely odd is among the notes."""
    parts = load_parts(run, directory)
    return dataclasses.replace(parts, notes=(*parts.notes, *quick_checks(parts)))
