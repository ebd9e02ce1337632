"""Servers as the doctor sees them: what a text is worth to them, asked as a run would ask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd.doctor.subject import Side, Subject
from tropd.servers.pool import Job, Pool
from tropd.servers.settings import ServerConfig
from tropd.servers.vllm import score_limit
from tropd.teachers.meeting import Card, dialect_of
from tropd.teachers.served import SPELLING


@dataclass(frozen=True, kw_only=True)
class Ward:
    """Servers as they are examined."""

    urls: tuple[str, ...]
    settings: ServerConfig
    card: Card
    top_k: int
    """That the method reads."""
    vocab_size: int
    text: tuple[int, ...]
    """A text of many scripts."""

    @property
    def room(self) -> int:
        """The longest text that can be scored."""
        return (self.card.max_model_len or 10**6) - 1

    def score(
        self, texts: Sequence[Sequence[int]], *, urls: Sequence[str] = (), top_k: int = 1, **changes: Any
    ) -> list[Tensor]:
        """The written tokens' log-probabilities.  `changes` are of the request."""
        speech = dialect_of(self.settings)

        def job(number: int, ids: Sequence[int]) -> Job[list[float]]:
            def read(answer: bytes, request_id: str) -> list[float]:
                (scored,) = speech.read_scores(
                    answer, model=self.card.id, sequences=[ids], firsts=[1], top_k=top_k, request_id=request_id
                )
                return scored.logprobs

            return Job(
                name=f"text {number}",
                path=speech.SCORE,
                body={**speech.score_body(self.card.id, [ids], top_k), **changes},
                named=speech.named,
                read=read,
                num_tokens=len(ids) + 1,
                limit_bytes=score_limit(len(ids) + 1, top_k),
            )

        pool = Pool(urls or self.urls, self.settings)
        try:
            return [torch.tensor(x) for x in pool.run([job(n, ids) for n, ids in enumerate(texts)])]
        finally:
            pool.close()


def ward_of(subject: Subject, settings: ServerConfig, card: Card, teacher: Side) -> Ward:
    vocab_size = min(len(teacher.tokenizer.get_vocab()), getattr(teacher.config, "vocab_size", 10**9))
    text = teacher.tokenizer.encode(SPELLING, add_special_tokens=False)
    if len(text) < 16:  # a tokenizer that makes next to nothing of it
        text = [index % vocab_size for index in range(1, 33)]
    return Ward(
        urls=tuple(subject.run.teacher.servers),
        settings=settings,
        card=card,
        top_k=min(subject.run.method.objective.teacher_top_k, vocab_size),
        vocab_size=vocab_size,
        text=tuple(text)[: (card.max_model_len or 10**6) - 1],
    )


def gap_of(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Mean and largest distance in nats; of several rows, those of the furthest row."""
    gaps = (a.clamp_min(-1e4) - b.clamp_min(-1e4)).abs()
    return float(gaps.mean(-1).max()), float(gaps.max())
