"""Meet a teacher's servers before the first step: which model they serve, and its scores of a known text.

From then on the canary travels with every scoring request: if its log-probabilities change, another model is
answering.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from tropd.base.writing import write_whole
from tropd.config.models import ServerConfig
from tropd.errors import ServerGarbled, ServerRefused, TeacherError, TeacherRefused
from tropd.servers.canary import Canary
from tropd.servers.cards import Card, cards_job
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool

CANARY = "The quick brown fox jumps over the lazy dog, and 12 + 30 = 42. Once upon a time there was"
_LONGEST = 16
T = TypeVar("T")


def canary_of(ids: Sequence[int], vocab_size: int) -> Canary:
    """The canary: tokens of a sentence, or arbitrary tokens if the tokenizer gives almost none for it."""
    own = [index for index in ids if index < vocab_size][:_LONGEST]
    return Canary(ids=tuple(own) if len(own) >= 4 else tuple(index % vocab_size for index in range(1, 9)))


def card_of(urls: Sequence[str], settings: ServerConfig) -> Card:
    """The model, which must be the same on every server; the context is the shortest one."""
    cards = [_card(url, settings) for url in urls]
    names = {card.id for card in cards}
    if len(names) > 1:
        raise TeacherRefused(
            f"the servers serve different models: {', '.join(sorted(names))}. Name one in server.model, or give each "
            "teacher its own servers."
        )
    lengths = [card.max_model_len for card in cards if card.max_model_len is not None]
    return Card(id=cards[0].id, root=cards[0].root, max_model_len=min(lengths, default=None))


def _card(url: str, settings: ServerConfig) -> Card:
    cards = _ask(url, settings, cards_job(url))
    own = [card for card in cards if not card.id.startswith("tropd-")]  # the others are adapters that a run gave it
    chosen = own if settings.model is None else [card for card in cards if card.id == settings.model]
    if len(chosen) == 1:
        lengths = [card.max_model_len for card in (*chosen, *own) if card.max_model_len is not None]
        return replace(chosen[0], max_model_len=next(iter(lengths), None))  # an adapter's is its base's
    there = ", ".join(card.id for card in cards)
    if settings.model is None:
        raise TeacherRefused(f"{url} serves several models: {there}. Name one in server.model.")
    raise TeacherRefused(f"server.model is {settings.model!r}, but {url} serves {there}.")


def _ask(url: str, settings: ServerConfig, job: Job[T]) -> T:
    """One request to one server, which may still be starting."""
    pool = Pool([url], settings)
    try:
        return pool.run([job])[0]
    finally:
        pool.close()


def meet(urls: Sequence[str], settings: ServerConfig, model: str, canary: Canary, top_k: int) -> Canary:
    """Ask every server to score the canary, with the top-k of training; the servers have to agree."""
    found = [_score(url, settings, model, canary, top_k) for url in urls]
    first = Canary(ids=canary.ids, logprobs=tuple(found[0]))
    for url, logprobs in zip(urls, found, strict=True):
        try:
            (canary if canary.logprobs else first).check(logprobs, settings.nats_for())
        except ServerGarbled as gap:
            raise TeacherRefused(f"{url}: {gap}") from gap
    return canary if canary.logprobs else first


def _score(url: str, settings: ServerConfig, model: str, canary: Canary, top_k: int) -> list[float]:
    dialect = dialect_of(settings)
    job = dialect.score_job(f"a known text at {url}", model, [canary.ids], [1], top_k)
    try:
        return _ask(url, settings, job)[0].logprobs
    except ServerRefused as refusal:
        advice = f" {dialect.top_k_advice(top_k, 'lower method.top_k')}" if "logprobs" in str(refusal) else ""
        raise TeacherRefused(f"the top-{top_k} of a known text was asked for, but {refusal}{advice}") from refusal


def keep(canary: Canary, path: Path) -> None:
    """Store the canary, so that a resumed run notices another teacher."""
    try:
        write_whole(path, json.dumps(asdict(canary)))
    except OSError as error:
        raise TeacherError(
            f"what the teacher's servers say of a known text cannot be kept in {path}: {error}. Free the disk or mend "
            "the folder, then start again."
        ) from error


def recall(path: Path, ids: tuple[int, ...]) -> Canary | None:
    try:
        kept = TypeAdapter(Canary).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return kept if kept.ids == ids else None
