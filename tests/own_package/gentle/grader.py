"""A grader as a function, as a class and as an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def shortness(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for nothing, less for each character."""
    return [1 / (1 + len(text)) for text in completions]


class Holds:
    """The share of the characters that the answer holds."""

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        pairs = zip(completions, columns["answer"], strict=True)
        return [len(set(text) & set(answer)) / max(len(set(answer)), 1) for text, answer in pairs]


holds = Holds()
