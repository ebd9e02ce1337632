"""The student's own engine, which writes fewer texts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd import Engine
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Completion, Request


class FewAtATime(Engine):
    """Writes as the student, at most `rows` texts at a time."""

    def __init__(self, rows: int = 2) -> None:
        self.rows = rows

    def prepare(self, student: Any, tokenizer: Any, vocab_size: int) -> None:
        self.inner = TransformersEngine(student, vocab_size=vocab_size, max_batch=self.rows)
        self.context = self.inner.context
        self.notes = [f"texts are written {self.rows} at a time."]

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return self.inner.generate(requests)

    def sync(self, version: int) -> None:
        self.inner.sync(version)
