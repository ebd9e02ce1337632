"""The transcripts that a report shows, chosen evenly over steps and packed small.

A transcript's fate of a token is the names of the terms that weigh it, joined by " + "; "" where none does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from tropd.errors import require
from tropd.report.history import History

NUM_TRANSCRIPTS, NUM_TOKENS = 1000, 300_000
CODES = {"context": "c", "student": "s", "teacher": "t", "environment": "e"}
_OPTIONAL = ("token_texts", "student_logprobs", "teacher_logprobs", "teacher_top_texts", "teacher_top_logprobs")
_NEEDED = ("id", "prompt_id", "prompt", "response", "reward", "finish", "token_ids", "authors", "behavior_logprobs")


@dataclass
class Shelf:
    """The transcripts that are shown, and how many there are."""

    transcripts: list[dict[str, Any]] = field(default_factory=list)
    num_kept: int = 0
    """Rollouts in the files of all runs."""
    problems: list[str] = field(default_factory=list)

    def as_data(self) -> dict[str, Any]:
        """Fates, and texts of the teacher's alternatives, are numbered: the same few occur again and again."""
        words: dict[str, int] = {}
        fates: dict[str, int] = {"": 0}
        packed = []
        for transcript in self.transcripts:
            tops = [
                None if top is None else [x for text, p in top for x in (number_of(words, text), p)]
                for top in transcript["tops"]
            ]
            packed.append(
                {**transcript, "tops": tops, "fates": [number_of(fates, fate) for fate in transcript["fates"]]}
            )
        return {"transcripts": packed, "words": list(words), "fates": list(fates), "kept": self.num_kept}


def number_of(numbers: dict[str, int], text: str) -> int:
    return numbers.setdefault(text, len(numbers))


def collect(runs: Sequence[History], num_transcripts: int = NUM_TRANSCRIPTS, num_tokens: int = NUM_TOKENS) -> Shelf:
    """Each run gets an equal part; within it the kept steps are spread evenly, the first and the last among them."""
    shelf = Shelf()
    per_run, tokens_per_run = -(-num_transcripts // max(len(runs), 1)), num_tokens // max(len(runs), 1)
    for number, run in enumerate(runs):
        chosen = spread(sorted(run.rollouts), math.ceil(per_run / 4))
        for i, step in enumerate(chosen):
            rows = per_run // len(chosen) + (i < per_run % len(chosen))
            kept = _read(run.rollouts[step], _time(run.rollouts[step]), rows, tokens_per_run // len(chosen))
            shelf.transcripts += [{"run": number, "step": step, **transcript} for transcript in kept.transcripts]
            shelf.num_kept += kept.num_rows
            shelf.problems += [f"{run.name}: {problem}" for problem in kept.problems]
        shelf.num_kept += sum(_num_rows(run.rollouts[step]) for step in set(run.rollouts) - set(chosen))
    return shelf


def spread(items: Sequence[Any], number: int) -> list[Any]:
    """So many of them, evenly, both ends included."""
    if len(items) <= number:
        return list(items)
    if number < 2:
        return list(items[-number:]) if number else []
    return [items[round(i * (len(items) - 1) / (number - 1))] for i in range(number)]


@dataclass(frozen=True)
class _File:
    transcripts: tuple[dict[str, Any], ...] = ()
    num_rows: int = 0
    problems: tuple[str, ...] = ()


@lru_cache(maxsize=4096)
def _read(path: Path, time: int, num_rows: int, num_tokens: int) -> _File:
    """`time` is when the file was written: a live page reads each file once."""
    require("pyarrow", "data", "reading saved rollouts")
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"rollouts/{path.name}"
    try:
        file = pq.ParquetFile(path)
        there = set(file.schema_arrow.names)
        missing = [column for column in _NEEDED if column not in there]
        if missing:
            return _File(problems=(f"{name} lacks the columns {', '.join(missing)}; left out",))
        weights = sorted(column for column in there if column.startswith("weight_"))
        table = file.read([*_NEEDED, *(column for column in _OPTIONAL if column in there), *weights])
        rows = table.take(spread(range(table.num_rows), num_rows)).to_pylist()
    except (OSError, pa.ArrowException, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        return _File(problems=(f"{name} cannot be read ({reason}); left out",))
    transcripts, problems, used = [], [], 0
    for row in rows:
        try:
            transcript = pack_row(row)
        except (TypeError, ValueError, LookupError) as error:
            problems.append(f"{name}, rollout {row['id']!r} cannot be read ({error}); left out")
            continue
        used += len(transcript["texts"])
        if transcripts and used > num_tokens:
            break
        transcripts.append(transcript)
    return _File(transcripts=tuple(transcripts), num_rows=table.num_rows, problems=tuple(problems))


def pack_row(row: dict[str, Any]) -> dict[str, Any]:
    """One rollout for the page: one entry per response token, log-probabilities in thousandths of a nat."""
    authors = [CODES[name] for name in row["authors"]]
    begin = next((i for i, code in enumerate(authors) if code != "c"), len(authors))
    length = len(row["token_ids"])

    def entries(column: str) -> list[Any]:
        values = row.get(column)
        if values is None:
            return [None] * (length - begin)
        if len(values) != length:
            raise ValueError(f"{len(values)} entries of {column} for {length} tokens")
        return values[begin:]

    if len(authors) != length:
        raise ValueError(f"{len(authors)} authors for {length} tokens")
    student = entries("student_logprobs") if "student_logprobs" in row else entries("behavior_logprobs")
    teacher = entries("teacher_logprobs")
    gaps = [abs(t - s) for s, t in zip(student, teacher, strict=True) if _known(s) and _known(t)]
    weights = {name[7:]: entries(name) for name in row if name.startswith("weight_")}
    texts = zip(entries("teacher_top_texts"), entries("teacher_top_logprobs"), strict=True)
    return {
        "id": row["id"],
        "prompt_id": row["prompt_id"],
        "prompt": row["prompt"],
        "response": row["response"] if "token_texts" not in row else None,
        "reward": row["reward"] if _known(row["reward"]) else None,
        "finish": row["finish"],
        "ids": row["token_ids"][begin:],
        "texts": [
            text if text is not None else f"⟨{i}⟩"
            for text, i in zip(entries("token_texts"), row["token_ids"][begin:], strict=True)
        ],
        "authors": "".join(authors[begin:]),
        "fates": [" + ".join(name for name, of in weights.items() if of[t]) for t in range(length - begin)],
        "student": [_thousandths(x) for x in student],
        "teacher": [_thousandths(x) for x in teacher],
        "tops": [
            None if t is None or x is None else [(a, _thousandths(b)) for a, b in zip(t, x, strict=True)]
            for t, x in texts
        ],
        "gap": round(max(gaps), 3) if gaps else None,
    }


def _known(x: float | None) -> bool:
    return x is not None and math.isfinite(x)


def _thousandths(x: float | None) -> int | str | None:
    """JSON has no infinity, so a probability of 0 is "-inf"."""
    if x is None or math.isnan(x):
        return None
    return round(1000 * x) if math.isfinite(x) else ("-inf" if x < 0 else "inf")


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@lru_cache(maxsize=100_000)
def _num_rows(path: Path) -> int:
    """From the file's footer alone; an unreadable file counts as empty."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException):
        return 0
