"""What the inputs are made of: models, data, a finished run, an adapter; and copies of them to be spoilt."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tests import small_runs
from tests.malformed.case import Case
from tests.malformed.texts import Spoil
from tests.small_runs import write_models, write_run
from tropd.cli.main import main


def write(folder: Path) -> Path:
    """Once for all cases, which only read it."""
    world = write_models(folder)
    values = small_runs.values_of(world, "quick", output=str(world / "run"), evaluation=_held_out(world))
    assert main(["train", str(write_toml(world / "run.toml", values))]) == 0
    lora = {"path": str(world / "student"), "lora": {"rank": 2}}
    adapter = write_run(world, world / "adapter", "quick", student=lora)
    assert main(["train", str(adapter), "--steps", "1"]) == 0
    stopping = {"support_collapse": "stop", "support_collapse_mass": 1.0}
    assert main(["train", str(write_run(world, world / "stopped", "quick", alarms=stopping))]) == 2
    return world


def _held_out(world: Path) -> dict[str, Any]:
    return {"data": {"path": str(world / "data.jsonl")}, "num_samples": 2, "max_new_tokens": 4, "every": 1}


def values_of(world: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    return small_runs.values_of(world, "quick", output=str(folder / "run"), **changes)


def write_toml(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(tomli_w.dumps(values))
    return path


def copied(source: Path, target: Path) -> Path:
    """Links to the same files: they are replaced, never changed."""
    shutil.copytree(source, target, copy_function=os.link, symlinks=True)
    return target


def spoilt(
    name: str, source: Path, file: str, spoil: Spoil, command: Sequence[str], names: str = "", **how: Any
) -> Case:
    """A command on a copy of a folder in which one file is wrong; COPY in the command is the copy."""

    def prepare(folder: Path) -> list[str]:
        copy = copied(source, folder / source.name)
        spoil(copy / file)
        return [word.replace("COPY", str(copy)).replace("FOLDER", str(folder)) for word in command]

    return Case(name=name, prepare=prepare, names=names or Path(file).name, **how)
