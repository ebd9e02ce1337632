"""Inputs that are wrong, made one by one: each ends in one sentence that names what is wrong, or it is a defect.

python -m tests.malformed [WORD ...]     runs those whose names hold a word, and lists what went wrong
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests.malformed import data_files, folders, models, run_files
from tests.malformed.case import Case

GROUPS = {"run files": run_files, "data": data_files, "models": models, "folders": folders}


def all_cases(world: Path) -> Iterator[Case]:
    """Every input, over a world that `tests.malformed.world.write` made."""
    for group in GROUPS.values():
        yield from group.cases(world)
