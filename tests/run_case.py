"""Small runs in processes of their own: start them, stop them, kill them, and compare what they leave behind.

A process is forked from a server that has imported the libraries and nothing else, so each begins afresh and at once.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tropd.base.fast_paths import TAKEN
from tropd.checkpoints import checkpoint as checkpoints

LIMIT_SECONDS = 300.0
"""Far above what a run takes on a busy machine: only a run that hangs comes to it."""
PRELOAD = ["tests.run_case", "tropd.run.start", "transformers.models.qwen3.modeling_qwen3", "peft", "pyarrow.parquet"]


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a process is to do."""

    train: Path | None = None
    """The configuration to start from; None resumes."""
    directory: Path
    step: int | None = None
    stop_after: int | None = None
    """Interrupts itself, as Ctrl-C would, once so many steps are recorded."""
    signals: tuple[int, ...] = (signal.SIGINT,)
    prepare: Callable[[], None] | None = None
    logs: Path | None = None
    """Where what it says is written; None: beside the run."""


@dataclass(kw_only=True)
class Ended:
    """How a process ended: its exit code, what it raised and what it said."""

    code: int
    error: str = ""
    message: str = ""
    said: str = ""
    took: set[str] = field(default_factory=set)
    """Fast paths that ran."""


@dataclass
class Running:
    process: Any
    log: Path
    begun: float = field(default_factory=time.monotonic)

    @property
    def over(self) -> bool:
        if time.monotonic() - self.begun > LIMIT_SECONDS:
            self.process.kill()
            raise AssertionError(f"a run went on for more than {LIMIT_SECONDS:g} s:\n{self.log.read_text()}")
        return not self.process.is_alive()

    def wait(self) -> Ended:
        self.process.join(LIMIT_SECONDS)
        assert self.over
        error = self.log.with_suffix(".error")
        raised = json.loads(error.read_text()) if error.exists() else {}
        paths = self.log.with_suffix(".paths")
        took = set(json.loads(paths.read_text())) if paths.exists() else set()
        return Ended(code=self.process.exitcode, said=self.log.read_text(), took=took, **raised)

    def kill_when(self, ready: Callable[[], bool], delay: float = 0.0) -> bool:
        """SIGKILL once `ready`; whether it came before the end."""
        while not self.over:
            if ready():
                time.sleep(delay)
                self.process.kill()
                break
            time.sleep(0.0003)
        return self.wait().code == -signal.SIGKILL


def processes() -> Any:
    """Makes processes from the one server that all tests share: whoever starts it says what it imports."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def start(order: Order) -> Running:
    logs = order.logs or order.directory.parent
    logs.mkdir(parents=True, exist_ok=True)
    log = logs / f"{order.directory.name}.{time.monotonic_ns()}.log"
    log.touch()
    process = processes().Process(target=_carry_out, args=(order, log))
    process.start()
    return Running(process, log)


def command(*argv: str, log: Path, output: Path | None = None) -> Running:
    """`tropd` with these arguments.  Its errors go to the log, and so does its output unless that has a place."""
    log.touch()
    process = processes().Process(target=_command, args=(argv, log, output or log))
    process.start()
    return Running(process, log)


def _command(argv: tuple[str, ...], log: Path, output: Path) -> None:
    from tropd.cli.main import main

    for number, path in ((1, output), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    torch.set_num_threads(1)
    sys.exit(main(list(argv)))


def train(path: Path, directory: Path, **how: Any) -> Ended:
    return start(Order(train=path, directory=directory, **how)).wait()


def resume(directory: Path, **how: Any) -> Ended:
    return start(Order(directory=directory, **how)).wait()


def _carry_out(order: Order, log: Path) -> None:
    """The body of a process."""
    from rich.console import Console

    from tropd.config.run import Run
    from tropd.errors import Interrupted
    from tropd.monitoring.display import PlainDisplay
    from tropd.run import start
    from tropd.types import StepRecord

    class SelfInterrupting(PlainDisplay):
        def update(self, record: StepRecord) -> None:
            super().update(record)
            if record.step + 1 == order.stop_after:
                for number in order.signals:
                    os.kill(os.getpid(), number)

    handle = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    torch.set_num_threads(1)
    if order.prepare is not None:
        order.prepare()
    display = SelfInterrupting(order.stop_after or 0, Console(highlight=False))
    try:
        if order.train is not None:
            start.train(Run.load(order.train), display=display)
        else:
            start.resume(order.directory, step=order.step, display=display)
    except Interrupted as stop:
        if stop.step != order.stop_after:
            sys.exit(128 + stop.signal)
    except BaseException as error:
        said = {"error": type(error).__name__, "message": str(error)}
        log.with_suffix(".error").write_text(json.dumps(said))
        sys.exit(1)
    finally:
        log.with_suffix(".paths").write_text(json.dumps(sorted(TAKEN)))


def loadable(directory: Path) -> list[int]:
    """The steps of a run's checkpoints, each of which can be loaded."""
    steps = checkpoints.steps_kept(directory)
    assert [checkpoints.load(checkpoints.place_of(directory, step)).step for step in steps] == steps
    return steps


def num_recorded(directory: Path) -> int:
    path = directory / "records.jsonl"
    return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0


def trace(directory: Path) -> dict[str, Any]:
    """All that a run leaves behind which does not tell the time, so that two runs can be compared to the last bit."""
    lines = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds", None)
        line.pop("run", None)
    newest = sorted((directory / "checkpoints").glob("*"))[-1]
    files = [p for folder in (directory / "model", newest, directory / "rollouts") for p in sorted(folder.glob("*"))]
    return {
        "records": lines,
        "files": {
            str(p.relative_to(directory)): digest(p) for p in files if p.suffix in (".safetensors", ".parquet", ".tmp")
        },
        "texts": read_texts(directory / "teacher_texts.sqlite"),
        "unfinished": sorted(str(p) for p in directory.rglob("*.tmp")),
    }


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def read_texts(path: Path) -> list[tuple[int, str, str]]:
    """In the order of writing.  Writing a text again would give it another number."""
    if not path.exists():
        return []
    with closing(sqlite3.connect(path)) as db:
        return db.execute("SELECT rowid, key, completion FROM texts ORDER BY rowid").fetchall()
