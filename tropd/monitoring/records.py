"""The records of a run, records.jsonl: one line per step.

    {"schema": 1, "kind": "header", ...facts of the run}
    {"kind": "step", "step": 0, "loss": null, ..., "nonfinite": {"/loss": "nan"}}

JSON has no NaN or infinity, so such a number is written as null and `nonfinite` holds, by JSON pointer, the number;
`read_records` puts it back.  A report is made from these files alone.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from tropd.base.reading import opened, parse_json, read_lines
from tropd.errors import CheckpointError, ConfigError
from tropd.types import StepRecord

SCHEMA = 1
LONGEST_LINE = 2**24

_STEP = TypeAdapter(StepRecord)
_STEP_FIELDS = {f.name for f in fields(StepRecord)} | {"kind", "nonfinite"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """A records.jsonl as read: its header, its steps, and a sentence for each line that could not be read."""

    header: dict[str, Any]
    steps: list[StepRecord]
    problems: list[str]


class RecordWriter:
    """Appends one line per step; a line is on the disk when `write` returns."""

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Start the records of a new run with its header.  Records that are there already are never overwritten."""
        if path.exists():
            raise ConfigError(
                f"a new run was asked to write {path}, but that file holds the records of a run. "
                "Resume that run (`tropd resume DIR`), or choose another run directory."
            )
        facts = dict(facts or {})
        assert not facts.keys() & {"schema", "kind", "nonfinite"}, "names that the header itself uses"
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, (_line({"schema": SCHEMA, "kind": "header", **facts}, default=str)).encode())
        self._open(path, last_step=None)

    @classmethod
    def resume(cls, path: Path, step: int) -> Self:
        """Go on before `step`: later records and a torn last line are dropped, the rest is kept byte for byte."""
        if not path.exists():
            raise CheckpointError(
                f"a run was asked to go on at step {step}, but its records {path} do not exist. "
                "Put the file back, or start a new run from the checkpoint in another directory."
            )
        read_header(path)
        kept, last_step, there = [], None, set()
        for line in path.read_bytes().splitlines(keepends=True):
            written = _step_of(line)
            if not line.endswith(b"\n") or (written is not None and written >= step):
                break
            kept.append(line)
            if written is not None:
                last_step = written
                there.add(written)
        _replace(path, b"".join(kept))
        writer = cls.__new__(cls)
        writer._open(path, last_step)
        writer.missing = [number for number in range(step) if number not in there]
        return writer

    def _open(self, path: Path, last_step: int | None) -> None:
        self.path = path
        self.last_step = last_step
        self.missing: list[int] = []
        """Steps before the one that a run goes on at, which are not in the file."""
        self._file = path.open("ab")

    def write(self, record: StepRecord) -> None:
        """Append a step and wait until the disk has it."""
        assert self.last_step is None or record.step > self.last_step, f"step {record.step} after {self.last_step}"
        self._file.write(_line({"kind": "step", **asdict(record)}).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.last_step = record.step

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_header(path: Path) -> dict[str, Any]:
    """The run's facts; refuses a file that is not a records.jsonl of this schema."""
    if not os.path.lexists(path):
        raise ConfigError(f"records were asked for, but {path} does not exist. Name a run directory that has one.")
    with opened(path) as file:
        header = _parse(file.readline(LONGEST_LINE))
    if header is None or header.get("kind") != "header":
        raise ConfigError(
            f"{path} was asked for as the records of a run, but its first line is no header. "
            "Name the records.jsonl that tropd wrote into the run directory."
        )
    if header.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path} is written in schema {header.get('schema')!r}, and this tropd reads schema {SCHEMA}. "
            "Read it with the version of tropd that wrote it, or upgrade: pip install --upgrade tropd"
        )
    return _restore(header)


def read_records(path: Path) -> Records:
    """All steps that can be read; the other lines are listed in `problems`."""
    header = read_header(path)
    lines = (line for number, line in read_lines(path) if number > 1)
    problems: list[str] = []
    steps = list(read_steps(lines, problems, first_line=2))
    return Records(header=header, steps=steps, problems=problems)


def find_step(path: Path, step: int, *, chunk: int = 2**22) -> StepRecord | None:
    """One record, without parsing the lines before it: each line begins with its step."""
    read_header(path)
    begin = _line({"kind": "step", "step": step})[:-2].encode() + b","
    with opened(path) as file:
        file.readline(LONGEST_LINE)
        place = file.tell() - 1
        if not (first := file.readline(LONGEST_LINE)).startswith(begin.rstrip(b"-0123456789,")) and first:
            return next((record for record in read_records(path).steps if record.step == step), None)
        file.seek(place)
        seen = b""
        while more := file.read(chunk):
            seen = seen[-len(begin) :] + more
            place += len(more)
            if (found := seen.find(b"\n" + begin)) >= 0:
                file.seek(place - len(seen) + found + 1)
                return _read_step(file.readline(LONGEST_LINE))[0]
    return None


def read_steps(
    lines: Iterable[bytes], problems: list[str], *, first_line: int, last_step: int | None = None
) -> Iterator[StepRecord]:
    """The steps that these lines hold after `last_step`, one by one; what is wrong with the others joins `problems`."""
    for number, line in enumerate(lines, start=first_line):
        record, complaints = _read_step(line)
        problems += [f"line {number}: {text}" for text in complaints]
        if record is None:
            continue
        if last_step is not None and record.step <= last_step:
            problems.append(f"line {number}: step {record.step} comes after step {last_step}; left out")
            continue
        if last_step is not None and record.step > last_step + 1:
            first, last = last_step + 1, record.step - 1
            lacking = f"step {first} is missing" if first == last else f"steps {first} to {last} are missing"
            problems.append(f"line {number}: {lacking}")
        last_step = record.step
        yield record


def _read_step(line: bytes) -> tuple[StepRecord | None, list[str]]:
    if not line.endswith(b"\n"):
        return None, ["torn: the run was cut off while writing it; left out"]
    values = _parse(line)
    if values is None:
        return None, ["not a JSON object; left out"]
    if values.get("kind") != "step":
        return None, [f"unknown kind {values.get('kind')!r}; left out"]
    unknown = sorted(values.keys() - _STEP_FIELDS)
    complaints = [f"unknown field {', '.join(unknown)}; ignored"] if unknown else []
    try:
        record = _STEP.validate_python({k: v for k, v in _restore(values).items() if k in _STEP_FIELDS - {"kind"}})
    except ValidationError as error:
        first = error.errors()[0]
        return None, [*complaints, f"not a step: {'.'.join(map(str, first['loc']))}: {first['msg']}; left out"]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return None, [*complaints, f"not a step: its `nonfinite` cannot be applied ({error}); left out"]
    return record, complaints


def _line(values: Mapping[str, Any], default: Callable[[Any], Any] | None = None) -> str:
    clean, nonfinite = _split(values, "")
    if nonfinite:
        clean = {**clean, "nonfinite": nonfinite}
    return json.dumps(clean, allow_nan=False, ensure_ascii=False, default=default) + "\n"


def _split(value: Any, pointer: str) -> tuple[Any, dict[str, str]]:
    """The value with None for each number that JSON cannot hold, and those numbers by JSON pointer."""
    if isinstance(value, float) and not math.isfinite(value):
        return None, {pointer: str(float(value))}
    if isinstance(value, Mapping):
        parts = {k: _split(v, f"{pointer}/{str(k).replace('~', '~0').replace('/', '~1')}") for k, v in value.items()}
        return {k: part for k, (part, _) in parts.items()}, _merge(found for _, found in parts.values())
    if isinstance(value, list | tuple):
        listed = [_split(v, f"{pointer}/{i}") for i, v in enumerate(value)]
        return [part for part, _ in listed], _merge(found for _, found in listed)
    return value, {}


def _merge(found: Iterator[dict[str, str]]) -> dict[str, str]:
    return {pointer: said for part in found for pointer, said in part.items()}


def _restore(values: dict[str, Any]) -> dict[str, Any]:
    """Puts back, in place, the numbers that JSON could not hold."""
    for pointer, said in values.pop("nonfinite", {}).items():
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
        place: Any = values
        for part in parents:
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = float(said)
    return values


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        values = parse_json(line, "the line", unique=False)
    except ConfigError:  # torn or foreign: the caller says so
        return None
    return values if isinstance(values, dict) else None


def _step_of(line: bytes) -> int | None:
    values = _parse(line)
    return values["step"] if values and values.get("kind") == "step" and isinstance(values.get("step"), int) else None


def _replace(path: Path, content: bytes) -> None:
    """Replace the file in one move: after a crash, or for another reader, it holds the old content or the new."""
    with temporary(path).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary(path).replace(path)


def temporary(path: Path) -> Path:
    return path.with_name(path.name + ".tmp")
