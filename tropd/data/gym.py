"""Grades by reasoning-gym's own verifiers: 1 for right, and between 0 and 1 what the task gives for less.

The column `entry` holds what the generator gave, as JSON: question, answer and metadata.  What is graded is what stands
in <answer>...</answer>, as the package reads it, or else the whole text.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tropd.data.answers import final_text
from tropd.errors import DataError

_MISSING = "grader 'gym' needs reasoning-gym, which is not installed. Run: pip install 'tropd[gym]'"


def gym(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """What reasoning-gym's verifier of the entry's task says of each text."""
    entries = columns.get("entry")
    if entries is None:
        raise DataError("grader 'gym' needs the column 'entry': what reasoning-gym's generator gave, as JSON.")
    return [_score(text, entry) for text, entry in zip(completions, entries, strict=True)]


def _score(completion: Any, said: Any) -> float:
    if not isinstance(completion, str):
        completion = str(completion[-1]["content"])
    entry = _read(said)
    text = final_text(completion)
    inside = _extract(text)
    return float(_verifier(entry["metadata"]["source_dataset"])(answer=text if inside is None else inside, entry=entry))


def _read(said: Any) -> Mapping[str, Any]:
    try:
        entry = json.loads(said) if isinstance(said, str) else said
        assert entry["metadata"]["source_dataset"] and "answer" in entry
    except (ValueError, TypeError, KeyError, AssertionError):
        raise DataError(
            f"grader 'gym' cannot read the entry {str(said)[:80]!r}. Write json.dumps(dataset[i]) in column 'entry'."
        ) from None
    return entry


def _extract(text: str) -> str | None:
    try:
        from reasoning_gym.utils import extract_answer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(_MISSING) from None
    return extract_answer(text)


@functools.cache
def _verifier(name: str) -> Callable[..., float]:
    try:
        from reasoning_gym import get_score_answer_fn  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise DataError(_MISSING) from None
    try:
        return get_score_answer_fn(name)
    except ValueError:
        raise DataError(f"reasoning-gym has no task '{name}': is it another version than the prompts'?") from None
