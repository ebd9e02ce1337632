"""Test requests to a teacher's servers, in the form of a run's requests: score a text, or write one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tropd.config.models import ServerConfig
from tropd.servers.answers import Scored
from tropd.servers.cards import Card
from tropd.servers.dialect import Dialect
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.types import Completion, Request

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Questions:
    """Servers of one model, and the texts of the test requests."""

    urls: tuple[str, ...]
    settings: ServerConfig
    card: Card
    top_k: int
    """The top-k that the method reads."""
    vocab_size: int
    text: tuple[int, ...]
    """The text that test texts are cut from."""

    @property
    def room(self) -> int:
        """The longest text that can be scored."""
        return (self.card.max_model_len or 10**6) - 1

    def at(self, url: str) -> Questions:
        """The same requests for one of the servers alone."""
        return replace(self, urls=(url,))

    @property
    def dialect(self) -> Dialect:
        return dialect_of(self.settings)

    def score(
        self, texts: Sequence[Sequence[int]], *, top_k: int | None = None, temperature: float = 1.0
    ) -> list[Scored]:
        """Score all tokens except the first of each text."""
        width = max(self.top_k if top_k is None else top_k, 1)
        jobs = [
            self.dialect.score_job(f"text {number}", self.card.id, [ids], [1], width, temperature)
            for number, ids in enumerate(texts)
        ]
        return [scored for (scored,) in self._ask(jobs)]

    def write(self, requests: Sequence[Request]) -> list[tuple[Completion, Scored]]:
        """Have texts written; returns them with the log-probability of each token when drawn."""
        width = max(self.top_k, 1)
        return self._ask(
            [
                self.dialect.own_text_job(f"text {number}", self.card.id, request, width)
                for number, request in enumerate(requests)
            ]
        )

    def _ask(self, jobs: list[Job[T]]) -> list[T]:
        pool = Pool(self.urls, self.settings)
        try:
            return pool.run(jobs)
        finally:
            pool.close()


def text_of(ids: Sequence[int], vocab_size: int, longest: int | None = None) -> tuple[int, ...]:
    """The text for test requests; arbitrary tokens if the tokenizer gives almost none for it."""
    own = [index for index in ids if index < vocab_size]
    known = own if len(own) >= 16 else [index % vocab_size for index in range(1, 33)]
    return tuple(known[:longest])
