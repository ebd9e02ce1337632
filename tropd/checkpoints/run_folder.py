"""A run's folder: where it may be, what it may contain when the run begins, and a lock for one process at a time.

A run replaces files with the names that it writes, such as `model` and `checkpoints`.  So it begins only in a folder
that holds nothing else, contains none of the run's inputs, and lies inside none of them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from tropd.checkpoints.checkpoint import writing
from tropd.config.models import TeacherConfig
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.objective.evidence import READER

RUN = "run.toml"
BEGUN = "run.toml.tmp"
_CACHES = ("*teacher_texts.sqlite*", "*teacher_scores*.sqlite*")
_LEFT = (BEGUN, *_CACHES, "rollout_weights", "rollout_weights.tmp")
"""Files that a killed or refused start may leave."""


def inputs_of(run: Run) -> dict[str, Path]:
    """The files and folders on this machine that the run reads, by the settings that name them."""
    named: dict[str, str | None] = {
        "student.path": run.student.path,
        "student.tokenizer": run.student.tokenizer,
        "data.path": run.data.path,
        "evaluation.data.path": run.evaluation.data.path if run.evaluation.data else None,
    }
    for name, teacher in run.all_teachers.items():
        where = f"teachers.{name}" if run.teachers else "teacher"
        named |= _inputs_of_model(where, teacher)
    for name, reader in run.all_readers.items():
        named |= _inputs_of_model(f"readers.{name}", reader)
    there = {name: Path(text).expanduser() for name, text in named.items() if text}
    return {name: path for name, path in there.items() if path.exists()}


def _inputs_of_model(where: str, model: TeacherConfig) -> dict[str, str | None]:
    return {
        f"{where}.path": None if model.path in ("base", "student", READER) else model.path,
        f"{where}.tokenizer": model.tokenizer,
        f"{where}.briefing.source": getattr(model.briefing, "source", None),
        f"{where}.direction.file": model.direction and model.direction.file,
    }


def check_inputs(run: Run, directory: Path) -> None:
    """Refuse a folder that contains an input of the run, or lies inside one.  Links are followed."""
    output = directory.expanduser().resolve()
    for name, path in inputs_of(run).items():
        place = path.resolve()
        if place == output or output in place.parents:
            raise ConfigError(
                f"output is {directory}, which holds what {name} names, {path}: the run would write over it. Set "
                "output to a separate folder."
            )
        if place in output.parents:
            raise ConfigError(
                f"output is {directory}, which lies in what {name} names, {path}. Set output to a folder outside of it."
            )


def check_place(run: Run, directory: Path) -> None:
    """Refuse a folder in which a new run would destroy something."""
    if not run.output.strip():
        raise ConfigError("output is empty. Name a folder for the run.")
    if (directory / RUN).exists():
        raise ConfigError(
            f"{directory} holds a run already. Go on with `tropd resume {directory}`, set output, or replace that run "
            "with `tropd train --overwrite`."
        )
    check_inputs(run, directory)
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"output is {directory}, which is a file. Name a folder for the run.")
    names = sorted(path.name for path in directory.iterdir())
    if foreign := [name for name in names if not any(fnmatch(name, left) for left in _LEFT)]:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConfigError(
            f"output is {directory}, which holds files that are not this run's: {', '.join(foreign[:3])}{more}. A run "
            "replaces files there, so it begins in a new or an empty folder only. Set output to one."
        )


def nothing() -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A folder that a new run has."""

    settle: Callable[[], None]
    """It holds a run from here on."""
    forget: Callable[[], None]
    """What it held before is not needed any more: the run has a step of its own."""


NOTHING_BEGUN = Begun(settle=nothing, forget=nothing)
"""Of the other processes of a run."""


@contextmanager
def begun(run: Run, directory: Path, *, overwrite: bool = False) -> Iterator[Begun]:
    """A new folder for a run, locked from before the first byte until the block ends.  If the block fails before
    anything was trained, only texts and scores of teachers stay, and an overwritten run comes back."""
    with _set_aside(directory) if overwrite else nullcontext(nothing) as forget:
        check_place(run, directory)
        created = [path for path in (directory, *directory.parents) if not path.exists()]
        with writing(directory):  # before models are read, so that a full disk is told at once
            directory.mkdir(parents=True, exist_ok=True)
            handle = _claim(directory)

        def settle() -> None:
            with writing(directory):
                (directory / BEGUN).replace(directory / RUN)  # the lock is the file's, whatever its name

        try:
            check_place(run, directory)  # another process may have been faster
            with writing(directory):
                os.ftruncate(handle, 0)
                os.write(handle, run.dump().encode())
            yield Begun(settle=settle, forget=forget)
        except BaseException:
            if not _has_steps(directory):
                _clear(directory)
                for path in created:
                    with suppress(OSError):  # it holds something
                        path.rmdir()
            raise
        finally:
            os.close(handle)


@contextmanager
def rewritten(run: Run, directory: Path) -> Iterator[None]:
    """Write this run to run.toml, and hold the lock on the new file too."""
    with writing(directory):
        handle = _claim(directory)
        os.ftruncate(handle, 0)
        os.write(handle, run.dump().encode())
        os.fsync(handle)
        (directory / BEGUN).replace(directory / RUN)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _set_aside(directory: Path) -> Iterator[Callable[[], None]]:
    """Rename a run's folder until the yielded function removes it; without that call the folder comes back.  A link to
    a folder stays one."""
    linked, directory = directory.is_symlink(), directory.resolve()
    aside = directory.with_name(f"{directory.name}.replaced")
    if aside.exists():
        raise ConfigError(
            f"{aside} exists: a start that was killed has put the run there that {directory} held. Move it back, or "
            "remove it."
        )
    if not (directory / RUN).exists():
        yield nothing
        return
    with locked(directory):
        directory.rename(aside)
    if linked:
        directory.mkdir()

    def remove() -> None:
        shutil.rmtree(aside, ignore_errors=True)

    try:
        yield remove
    finally:
        if aside.exists() and not _has_steps(directory):
            shutil.rmtree(directory, ignore_errors=True)
            aside.rename(directory)


def _has_steps(directory: Path) -> bool:
    """Whether a run has something to resume from or to look at."""
    records = directory / "records.jsonl"
    with suppress(OSError), records.open("rb") as file:
        file.readline()
        if file.readline():
            return True
    return any(directory.glob("checkpoints/*")) or any(directory.glob("**/batches/*"))


def _clear(directory: Path) -> None:
    """Remove what a run wrote into its folder before its first step, except texts and scores of teachers."""
    for path in directory.iterdir():
        if any(fnmatch(path.name, kept) for kept in _CACHES) and not _is_empty(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_empty(path: Path) -> bool:
    """Whether a cache is empty; a file beside a database counts as part of it."""
    if not path.name.endswith(".sqlite"):
        return not path.with_name(path.name[: path.name.index(".sqlite") + 7]).exists()
    try:
        with closing(sqlite3.connect(path)) as cache:
            tables = [name for (name,) in cache.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            return not any(cache.execute(f"SELECT 1 FROM {name} LIMIT 1").fetchone() for name in tables)
    except sqlite3.Error:
        return False


def _claim(directory: Path) -> int:
    """The open and locked file that will be run.toml."""
    path = directory / BEGUN
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            _lock(handle, directory)
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # the process that held the lock has given the file another name, or removed it


@contextmanager
def locked(directory: Path, file_name: str = RUN) -> Iterator[None]:
    """Lock the run for this process: two would write into each other's records and checkpoints."""
    with (directory / file_name).open() as file:
        _lock(file.fileno(), directory)
        yield


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # goes with the process, however it ends
    except BlockingIOError:
        raise CheckpointError(
            f"another process is at work on the run in {directory}. Wait for it, stop it, or use another folder."
        ) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):  # file systems that know no locks
            raise
