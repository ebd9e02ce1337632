"""A run's folder: where it may lie, what may be in it when the run begins, and that one process at a time writes there.

A run replaces what stands under the names of its files, `model` and `checkpoints` among them.  So it begins only in a
folder that holds nothing else, that holds nothing the run reads, and that lies in nothing the run reads.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from tropd.checkpoints.checkpoint import writing
from tropd.config import file as config_file
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError

RUN = "run.toml"
BEGUN = "run.toml.tmp"
_LEFT = (BEGUN, "*teacher_texts.sqlite*", "*teacher_scores*.sqlite*", "rollout_weights", "rollout_weights.tmp")
"""What a start that was killed or refused may leave."""


def inputs_of(run: Run) -> dict[str, Path]:
    """The files and folders on this machine that the run reads, by the settings that name them."""
    said = {
        "student.path": run.student.path,
        "student.tokenizer": run.student.tokenizer,
        "data.path": run.data.path,
        "evaluation.data.path": run.evaluation.data.path if run.evaluation.data else None,
    }
    for name, teacher in run.all_teachers.items():
        where = f"teachers.{name}" if run.teachers else "teacher"
        own = None if teacher.path == "base" else teacher.path
        said |= {f"{where}.path": own, f"{where}.tokenizer": teacher.tokenizer}
    there = {name: Path(text).expanduser() for name, text in said.items() if text}
    return {name: path for name, path in there.items() if path.exists()}


def check_inputs(run: Run, directory: Path) -> None:
    """Refuse a folder that holds something the run reads, or lies in it.  Links are followed."""
    own = directory.expanduser().resolve()
    for name, path in inputs_of(run).items():
        place = path.resolve()
        if place == own or own in place.parents:
            raise ConfigError(
                f"output is {directory}, which holds what {name} names, {path}: the run would write over it. Set "
                "output to a folder of its own."
            )
        if place in own.parents:
            raise ConfigError(
                f"output is {directory}, which lies in what {name} names, {path}. Set output to a folder outside of it."
            )


def check_place(run: Run, directory: Path) -> None:
    """Refuse a folder in which a new run would destroy something."""
    if not run.output.strip():
        raise ConfigError("output is empty. Name a folder for the run.")
    if (directory / RUN).exists():
        raise ConfigError(f"{directory} holds a run already. Go on with `tropd resume {directory}`, or set output.")
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


@contextmanager
def begun(run: Run, directory: Path) -> Iterator[Callable[[], None]]:
    """A new folder for a run, locked from before the first byte until the block ends.  It holds a run from the moment
    that what is yielded is called; a block that fails before that leaves none."""
    check_place(run, directory)
    with writing(directory):  # before models are read, so that a full disk is told at once
        directory.mkdir(parents=True, exist_ok=True)
        handle = _claim(directory)
    path, is_run = directory / BEGUN, False

    def settle() -> None:
        nonlocal is_run
        with writing(directory):
            path.replace(directory / RUN)  # the lock is the file's, whatever its name
        is_run = True

    try:
        check_place(run, directory)  # somebody may have been faster
        with writing(directory):
            os.ftruncate(handle, 0)
            os.write(handle, config_file.dump(run).encode())
        yield settle
    except BaseException:
        if not is_run:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(handle)


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
def alone(directory: Path, locked: str = RUN) -> Iterator[None]:
    """One process for a run: two would write into each other's records and checkpoints."""
    with (directory / locked).open() as file:
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
