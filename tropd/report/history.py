"""A run, read from its folder: records as columns, evaluations, alarms, configuration, and the problems in them.

Nothing here raises for what a run left behind: what cannot be understood is named in `problems`.  A `History` can be
refreshed while its run goes on, and reads only what is new.
"""

from __future__ import annotations

import math
import os
from array import array
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tropd.base.reading import opened, read_toml
from tropd.errors import ConfigError
from tropd.monitoring.records import LONGEST_LINE, read_header, read_steps
from tropd.monitoring.scores import PromptScores, read_scores
from tropd.types import StepRecord

NOT_METRICS = {"num_prompts"}


@dataclass
class History:
    """What is known of one run.  Columns hold one number per recorded step, NaN where it is absent."""

    directory: Path
    name: str
    header: dict[str, Any] = field(default_factory=dict)
    steps: list[int] = field(default_factory=list)
    values: dict[str, array[float]] = field(default_factory=dict)
    """Columns, as far as their last number."""
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    """By the number of steps trained."""
    scores: dict[int, dict[str, PromptScores]] = field(default_factory=dict)
    alarms: list[tuple[int, str, str]] = field(default_factory=list)
    """Step, name, message."""
    config: dict[str, str] = field(default_factory=dict)
    rollouts: dict[int, Path] = field(default_factory=dict)
    _wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    _read: tuple[int, int, int] = (0, 0, 0)
    """Inode, bytes and lines of the records that were read."""
    _stamp: tuple[Any, ...] = ()

    @property
    def problems(self) -> list[str]:
        return [text for part in self._wrong.values() for text in part]

    @property
    def planned_steps(self) -> int | None:
        text = self.config.get("steps", "")
        return int(text) if text.isdecimal() else None

    @property
    def finished(self) -> bool:
        return bool(self.steps) and self.planned_steps == self.steps[-1] + 1

    @property
    def method(self) -> str:
        return str(self.header.get("method") or self.config.get("method.name", "not known"))

    def column(self, name: str) -> np.ndarray:
        known = np.array(self.values.get(name, ()), dtype=np.float64)
        return np.append(known, np.full(len(self.steps) - len(known), np.nan))

    def names(self, prefix: str) -> list[str]:
        """What comes after the prefix, of the columns that begin with it."""
        return [name.removeprefix(prefix) for name in self.values if name.startswith(prefix)]

    def refresh(self) -> bool:
        """Read what is new; whether anything was."""
        stamp = self._look()
        if stamp == self._stamp:
            return False
        self._read_config()
        self._read_records()
        self.scores, self._wrong["scores"] = read_scores(self.directory / "evaluations")
        done = self.steps[-1] + 1 if self.steps else 0
        self.scores = {step: scores for step, scores in self.scores.items() if step <= done}
        kept = {int(path.stem[5:]): path for path in _parquets(self.directory)}
        self.rollouts = {step: path for step, path in kept.items() if step < done or not self.steps}
        self._stamp = stamp
        return True

    def _look(self) -> tuple[Any, ...]:
        """Changes whenever a file of the run does."""
        files = [self.directory / "run.toml", self.directory / "records.jsonl", *_parquets(self.directory)]
        files += sorted((self.directory / "evaluations").glob("step_*.json"))
        return tuple((path.name, *_state(path)) for path in files)

    def _read_config(self) -> None:
        path = self.directory / "run.toml"
        self.config, self._wrong["config"] = {}, []
        try:
            if not path.exists():
                raise ConfigError("run.toml is missing")
            self.config = flatten(read_toml(path))
            self._wrong["config"] = [] if self.config else ["run.toml is empty: the configuration is not known"]
        except ConfigError as error:
            self._wrong["config"] = [f"{str(error).rstrip('.')}: the configuration is not known"]

    def _read_records(self) -> None:
        path = self.directory / "records.jsonl"
        inode, size, _ = _state(path)
        if inode != self._read[0] or size < self._read[1]:
            self._forget()
        self._wrong["torn"] = []
        if not size:
            self._wrong["header"] = ["records.jsonl is missing or empty: no step is known"]
            return
        self._read = (inode, *self._read[1:])
        problems: list[str] = []
        try:
            with opened(path) as file:
                file.seek(self._read[1])
                last = self.steps[-1] if self.steps else -1
                lines = self._lines(path, file, size)
                for record in read_steps(lines, problems, first_line=max(self._read[2] + 1, 2), last_step=last):
                    self._add(record)
        except ConfigError as error:
            self._wrong["header"] = [str(error)]
        self._wrong["records"] += [f"records.jsonl, {text}" for text in problems]

    def _lines(self, path: Path, file: BinaryIO, size: int) -> Iterator[bytes]:
        """The whole lines up to `size` that are new, after the header; none where that says that they mean something
        else."""
        inode, reached, number = self._read
        while reached < size and (line := file.readline(LONGEST_LINE)):
            if not line.endswith(b"\n"):
                self._wrong["torn"] = ["the last line of records.jsonl is torn: the run was cut off, or is writing it"]
                return
            reached, number = reached + len(line), number + 1
            self._read = (inode, reached, number)
            if number > 1:
                yield line
            elif not self._take_header(path) and b'"schema"' in line:
                self._read = (inode, size, number)
                return

    def _take_header(self, path: Path) -> bool:
        try:
            self.header = read_header(path)
            self._wrong["header"] = []
            before = self.header.get("before")
            if isinstance(before, Mapping) and before:
                self.evaluations[0] = {k: float(v) for k, v in before.items() if isinstance(v, int | float)}
        except ConfigError as error:
            self._wrong["header"] = [str(error)]
        return not self._wrong["header"]

    def _forget(self) -> None:
        self.header, self.steps, self.values, self.evaluations, self.alarms = {}, [], {}, {}, []
        self._wrong["records"] = []
        self._read = (_state(self.directory / "records.jsonl")[0], 0, 0)

    def _add(self, record: StepRecord) -> None:
        known = len(self.steps)
        self.steps.append(record.step)
        for name, x in numbers(record).items():
            column = self.values.setdefault(name, array("d"))
            column.extend([math.nan] * (known - len(column)))
            column.append(x)
        if record.evaluation:
            self.evaluations[record.step + 1] = dict(record.evaluation)
        self.alarms += [(record.step, *split_alarm(text)) for text in record.alarms]


def numbers(record: StepRecord) -> dict[str, float]:
    """One step's numbers, as columns are named."""
    columns = {"loss": record.loss, "gradient_norm": record.gradient_norm, "learning_rate": record.learning_rate}
    written = record.tokens.get("student", 0) + record.tokens.get("teacher", 0)
    for name, term in record.terms.items():
        columns |= {f"loss/{name}": term.loss, f"share/{name}": term.tokens / written if written else math.nan}
    columns |= {f"probe/{name}": x for name, x in record.probes.items()}
    columns |= {f"tokens/{name}": float(x) for name, x in record.tokens.items()}
    columns |= {f"seconds/{name}": x for name, x in record.seconds.items() if name != "total"}
    whole = record.seconds.get("total", sum(record.seconds.values()))
    if whole > 0:
        columns["tokens_per_second"] = sum(record.tokens.values()) / whole
    return columns


def split_alarm(text: str) -> tuple[str, str]:
    """`mismatch: step 3: sampler and trainer disagree` -> its name and its message."""
    name, colon, message = text.partition(": ")
    return (name, message) if colon and " " not in name else ("alarm", text)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"method": {"beta": 0.1}} -> {"method.beta": "0.1"}"""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, str) else str(value)
    return flat


def read_history(directory: Path, name: str | None = None) -> History:
    history = History(directory=directory, name=name or directory.resolve().name)
    history.refresh()
    return history


def _parquets(directory: Path) -> list[Path]:
    return sorted(p for p in (directory / "rollouts").glob("step_*.parquet") if p.stem[5:].isdecimal())


def _state(path: Path) -> tuple[int, int, int]:
    """Inode, size, time; zeros for a file that is not there."""
    try:
        status = os.stat(path)
    except OSError:
        return 0, 0, 0
    return status.st_ino, status.st_size, status.st_mtime_ns
