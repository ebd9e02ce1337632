"""The progress of an evaluation: JSON lines, one header with the settings, then one line per prompt.

Lines are only ever appended.  A line that a crash tore is dropped; a file of other settings is refused, not mixed with.
One file may hold several versions of the weights: a line counts only for its own version and its own prompt.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tropd.base.reading import check_file
from tropd.errors import ConfigError, DataError
from tropd.evaluation.results import EvalAnswer, EvalItem
from tropd.types import Finish, Prompt

KIND = "tropd evaluation"
SCHEMA = 1


def key_of_prompt(prompt: Prompt, version: int | str) -> str:
    """Names the weights and everything of the prompt that its answers and scores depend on."""
    facts = [str(version), prompt.id, list(prompt.token_ids), prompt.answer, dict(prompt.columns)]
    text = json.dumps(facts, sort_keys=True, default=repr)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


class ProgressFile:
    """Opens or starts the file; refuses one that was written with other settings."""

    def __init__(self, path: Path, settings: Mapping[str, object]) -> None:
        self.path = path
        header = {"kind": KIND, "schema": SCHEMA, "settings": dict(settings)}
        if path.exists():
            check_file(path)
        if not path.exists() or path.stat().st_size == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            started = path.with_name(path.name + ".tmp")
            started.write_text(json.dumps(header) + "\n", encoding="utf-8")
            started.replace(path)
        self._lines = path.read_bytes().split(b"\n")
        self._check(header)
        # The last piece has no line end: it is empty, or what a crash left of a line.
        if self._lines.pop():
            os.truncate(path, sum(len(line) + 1 for line in self._lines))

    def read(self, keys: Mapping[str, str]) -> dict[str, EvalItem]:
        """The items of these prompts (id to key) that are in the file."""
        items = {}
        for number, line in enumerate(self._lines[1:], start=2):
            try:
                row = json.loads(line)
                if keys.get(row["id"]) == row["key"]:
                    items[row["id"]] = item_of(row)
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                raise DataError(
                    f"line {number} of {self.path} is no evaluated prompt ({type(error).__name__}: {error}). "
                    "Something else wrote into the file: remove the line, or use another file."
                ) from error
        return items

    def append(self, items: Sequence[EvalItem], keys: Mapping[str, str]) -> None:
        """Returns when the lines are on the disk."""
        lines = [json.dumps(row_of(item, keys[item.id]), ensure_ascii=False, allow_nan=False) for item in items]
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(line + "\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())

    def _check(self, header: dict[str, Any]) -> None:
        try:
            first = json.loads(self._lines[0])
            kind, schema, there = first["kind"], first["schema"], first["settings"]
        except (ValueError, KeyError, TypeError, RecursionError):
            kind, schema, there = None, None, {}
        if kind != KIND or schema != SCHEMA:
            raise ConfigError(
                f"{self.path} was given to save an evaluation's progress, but it is not such a file "
                f"(schema {SCHEMA}). Give another path."
            )
        wanted = header["settings"]
        differ = [name for name in sorted(wanted.keys() | there.keys()) if wanted.get(name) != there.get(name)]
        if differ:
            changes = "; ".join(f"{name} was {there.get(name)!r}, now {wanted.get(name)!r}" for name in differ)
            raise ConfigError(
                f"{self.path} holds an evaluation with other settings: {changes}. Give another path, or the "
                "old settings."
            )


def row_of(item: EvalItem, key: str) -> dict[str, Any]:
    return {
        "id": item.id,
        "texts": [answer.text for answer in item.samples],
        "scores": [answer.score for answer in item.samples],
        "num_tokens": [answer.num_tokens for answer in item.samples],
        "finishes": [answer.finish for answer in item.samples],
        "greedy": None if item.greedy is None else _row_of_answer(item.greedy),
        "key": key,
    }


def _row_of_answer(answer: EvalAnswer) -> dict[str, Any]:
    return {"text": answer.text, "score": answer.score, "num_tokens": answer.num_tokens, "finish": answer.finish}


def item_of(row: dict[str, Any]) -> EvalItem:
    columns = zip(row["texts"], row["scores"], row["num_tokens"], row["finishes"], strict=True)
    samples = [EvalAnswer(text=t, score=s, num_tokens=n, finish=Finish(f)) for t, s, n, f in columns]
    greedy = row["greedy"]
    if greedy is not None:
        greedy = EvalAnswer(**{**greedy, "finish": Finish(greedy["finish"])})
    return EvalItem(id=row["id"], samples=tuple(samples), greedy=greedy)
