"""The runs that a command names, and what to call them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tropd.errors import ConfigError
from tropd.report.history import History, read_history


def check_run(directory: Path) -> None:
    """Refuses what holds nothing of a run."""
    if any((directory / name).exists() for name in ("records.jsonl", "run.toml", "run.toml.tmp")):
        return
    if not directory.is_dir():
        raise ConfigError(f"there is no folder {directory}. Name the folder of a run.")
    inside = sorted(p.parent.name for p in directory.glob("*/records.jsonl"))
    hint = f" Runs inside it: {', '.join(inside[:5])}." if inside else ""
    raise ConfigError(f"{directory} is no run's folder: it holds neither records.jsonl nor run.toml.{hint}")


def names_of(directories: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all of them apart."""
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ConfigError(f"{twice} was named twice. Name each run once.")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return _without_common_start(names)
    return [str(path) for path in paths]


def _without_common_start(names: list[str]) -> list[str]:
    """`bed_opd_0`, `bed_tropd_0` -> `opd_0`, `tropd_0`: what all share tells nothing apart."""
    common = common_start(names) if len(names) > 1 else ""
    cut = max(common.rfind(sign) for sign in "_-/") + 1
    return [name[cut:] for name in names] if all(len(name) > cut for name in names) else names


def common_start(names: Sequence[str]) -> str:
    """The letters that all begin with."""
    first = names[0]
    return first[: next((i for i, c in enumerate(first) if any(name[i : i + 1] != c for name in names)), len(first))]


def read_runs(directories: Sequence[Path]) -> list[History]:
    for directory in directories:
        check_run(directory)
    named = zip(directories, names_of(directories), strict=True)
    return [read_history(directory, name) for directory, name in named]
