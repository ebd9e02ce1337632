"""What a teacher's servers are asked about themselves, as a run would ask: what a text is worth to them, and what they
would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from tropd.config.models import ServerConfig
from tropd.servers.pool import Job, Pool
from tropd.servers.vllm import Scored, score_limit, text_limit
from tropd.teachers.meeting import Card, dialect_of
from tropd.types import Completion, Request

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Servers of one model, and the texts that they are asked about."""

    urls: tuple[str, ...]
    settings: ServerConfig
    card: Card
    top_k: int
    """That the method reads."""
    vocab_size: int
    text: tuple[int, ...]
    """Its tokens are those that texts are made of."""

    @property
    def room(self) -> int:
        """The longest text that can be scored."""
        return (self.card.max_model_len or 10**6) - 1

    def at(self, url: str) -> Questions:
        """To one of the servers alone."""
        return replace(self, urls=(url,))

    def score(self, texts: Sequence[Sequence[int]], *, top_k: int | None = None, **changes: Any) -> list[Scored]:
        """All tokens but the first of each text.  `changes` are of the request."""
        speech, width = dialect_of(self.settings), max(self.top_k if top_k is None else top_k, 1)

        def job(number: int, ids: Sequence[int]) -> Job[Scored]:
            def read(answer: bytes, request_id: str) -> Scored:
                how: dict[str, Any] = {"model": self.card.id, "top_k": width, "request_id": request_id}
                return speech.read_scores(answer, sequences=[ids], firsts=[1], **how)[0]

            return Job(
                name=f"text {number}",
                path=speech.SCORE,
                body={**speech.score_body(self.card.id, [ids], width), **changes},
                named=speech.named,
                read=read,
                num_tokens=len(ids) + 1,
                limit_bytes=score_limit(len(ids) + 1, width),
            )

        return self._ask([job(number, ids) for number, ids in enumerate(texts)])

    def write(self, requests: Sequence[Request]) -> list[tuple[Completion, Scored]]:
        """Texts, and what was said of each token when it was drawn."""
        speech, width = dialect_of(self.settings), max(self.top_k, 1)

        def job(number: int, request: Request) -> Job[tuple[Completion, Scored]]:
            how: dict[str, Any] = {"model": self.card.id, "request": request, "top_k": width}
            return Job(
                name=f"text {number}",
                path=speech.TEXT,
                body=speech.text_body(self.card.id, request, top_k=width),
                named=speech.named,
                read=lambda answer, request_id: speech.read_own_text(answer, request_id=request_id, **how),
                num_tokens=len(request.token_ids) + request.max_new_tokens,
                limit_bytes=text_limit(request, width),
            )

        return self._ask([job(number, request) for number, request in enumerate(requests)])

    def _ask(self, jobs: list[Job[T]]) -> list[T]:
        pool = Pool(self.urls, self.settings)
        try:
            return pool.run(jobs)
        finally:
            pool.close()


def text_of(ids: Sequence[int], vocab_size: int, longest: int | None = None) -> tuple[int, ...]:
    """The text that servers are asked about; other tokens where a tokenizer makes next to nothing of it."""
    own = [index for index in ids if index < vocab_size]
    known = own if len(own) >= 16 else [index % vocab_size for index in range(1, 33)]
    return tuple(known[:longest])
