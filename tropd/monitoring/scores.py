"""Every prompt's scores at every evaluation: evaluations/step_000050.json.  Paired comparisons are made from them.

{"schema": 1, "step": 50, "prompts": {"17": {"scores": [1.0, 0.0], "greedy": 1.0}, ...}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

from tropd.base.reading import read_json
from tropd.errors import ConfigError
from tropd.evaluation.results import EvalItem
from tropd.monitoring.records import temporary

SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScores:
    """The scores of one prompt's answers."""

    scores: tuple[float, ...] = ()
    greedy: float | None = None

    @property
    def mean(self) -> float | None:
        return fmean(self.scores) if self.scores else None


def write_scores(directory: Path, step: int, items: Sequence[EvalItem]) -> Path:
    """Write the scores of the weights after `step` steps; a crash leaves the whole file or none."""
    prompts = {
        item.id: {
            "scores": [answer.score for answer in item.samples if answer.score is not None],
            "greedy": item.greedy.score if item.greedy is not None else None,
        }
        for item in items
    }
    path = directory / f"step_{step:06d}.json"
    directory.mkdir(parents=True, exist_ok=True)
    temporary(path).write_text(json.dumps({"schema": SCHEMA, "step": step, "prompts": prompts}) + "\n")
    temporary(path).replace(path)
    return path


def read_scores(directory: Path) -> tuple[dict[int, dict[str, PromptScores]], list[str]]:
    """The scores by step, then by prompt, and a sentence for each file that could not be read."""
    scores: dict[int, dict[str, PromptScores]] = {}
    problems = []
    for path in sorted(directory.glob("step_*.json")):
        try:
            values = read_json(path)
            if values["schema"] != SCHEMA:
                raise ValueError(f"it is written in schema {values['schema']!r}, and this tropd reads schema {SCHEMA}")
            scores[int(values["step"])] = {name: _scores(row) for name, row in values["prompts"].items()}
        except (ConfigError, ValueError, LookupError, TypeError, AttributeError) as error:
            problems.append(f"{directory.name}/{path.name} cannot be understood ({error}); left out")
    return scores, problems


def _scores(row: Mapping[str, Any]) -> PromptScores:
    scores = tuple(float(x) for x in row["scores"])
    greedy = None if row["greedy"] is None else float(row["greedy"])
    if not all(isfinite(x) for x in [*scores, greedy or 0.0]):
        raise ValueError("a score is not a finite number")
    return PromptScores(scores=scores, greedy=greedy)
