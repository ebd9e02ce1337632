"""Measures the teacher's servers with a few requests, before a run depends on them."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence

from tropd.config.models import ServerConfig, base_url
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.subject import Side, Subject
from tropd.errors import ServerError, ServerGarbled, ServerRefused, TeacherError, TropdError
from tropd.servers.cards import Card
from tropd.servers.client import Client
from tropd.servers.dialects import dialect_of
from tropd.servers.settings import check_addresses
from tropd.teachers.audit import audit
from tropd.teachers.meeting import card_of
from tropd.teachers.questions import Questions, text_of
from tropd.teachers.reference import reference_of
from tropd.teachers.served import SPELLING, compare_tokenizers

_MOST_TOP_K = 1024
_PATIENCE = 20.0
"""Seconds to wait for a server.  A run waits longer, because its servers may still be starting."""


def check_servers(subject: Subject, *, weights: bool) -> Iterator[Check]:
    """All checks of servers, from reachable to fast; checks that need a missing answer are left out.  `weights`:
    compare with a forward pass in this process, if the teacher's weights are in a local folder."""
    config, teacher = subject.run.teacher, subject.teacher
    if not config.servers or (teacher is None and not config.only_writes):
        return
    patience = min(config.server.deadline_seconds, _PATIENCE)
    settings = dataclasses.replace(config.server, deadline_seconds=patience)
    try:
        for caution in check_addresses(config.servers, settings):
            yield warning("servers: security", caution, "")
        card = card_of(config.servers, settings)
    except TropdError as refusal:
        yield error("servers", str(refusal), "Start them, and compare teacher.servers and teacher.server.model.")
        return
    root = f" ({card.root})" if card.root and card.root != card.id else ""
    yield ok("servers", f"{len(config.servers)} answer, and serve {card.id}{root}")
    if teacher is None:
        return
    tokenizers = list(_check_tokenizers(config.servers, settings, card.id, teacher))
    yield from tokenizers
    if refusal := dialect_of(settings).no_scores:
        yield ok("servers: scores", f"none: {refusal.rstrip('.')}")
        return
    if any(check.level == "error" for check in tokenizers):
        return
    questions = _questions(subject, settings, card, teacher)
    limits: list[int] = []
    yield from _answers(lambda: _check_top_k(questions, limits))
    if not limits:
        return
    questions = dataclasses.replace(questions, top_k=min(questions.top_k, *limits))
    yield from _answers(lambda: _audit(questions, subject, weights))
    yield from _answers(lambda: _check_lengths(questions, subject))


def _questions(subject: Subject, settings: ServerConfig, card: Card, teacher: Side) -> Questions:
    config = subject.run.teacher
    vocab_size = min(len(teacher.tokenizer.get_vocab()), getattr(teacher.config, "vocab_size", 10**9))
    room = None if card.max_model_len is None else card.max_model_len - 1
    return Questions(
        urls=tuple(dict.fromkeys(base_url(url) for url in config.servers)),
        settings=dataclasses.replace(settings, canary_nats=settings.nats_for(config.dtype)),
        card=card,
        top_k=min(subject.run.method.objective.teacher_top_k, vocab_size),
        vocab_size=vocab_size,
        text=text_of(teacher.tokenizer.encode(SPELLING, add_special_tokens=False), vocab_size, room),
    )


def _answers(look: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    try:
        yield from look()
    except (ServerError, TeacherError) as failure:
        yield error("servers: answers", str(failure), "Look at the server's own log.")


def _audit(questions: Questions, subject: Subject, weights: bool) -> Iterator[Check]:
    """The same checks that a run makes when it meets its servers."""
    config, reference = subject.run.teacher, None
    if weights:
        reference = reference_of(config, questions.text, questions.top_k, math.inf)
        if reference is None:
            said = "not compared with a forward pass here: the weights are in no local folder, or do not fit"
            yield ok("servers: parity", said)
    for finding in audit(questions, reference)[0]:
        yield Check(name=f"servers: {finding.name}", level=finding.level, found=finding.found, advice=finding.advice)


def _check_tokenizers(urls: Sequence[str], settings: ServerConfig, model: str, teacher: Side) -> Iterator[Check]:
    clients = [Client(url, settings) for url in urls]
    try:
        notes = compare_tokenizers(clients, model, teacher.tokenizer)
    except TropdError as refusal:
        yield error("servers: tokenizer", str(refusal))
        return
    finally:
        for client in clients:
            client.close()
    for note in notes:
        yield warning("servers: tokenizer", note, "Make sure that teacher.path is the model that is served.")
    if not notes:
        yield ok("servers: tokenizer", "they cut a text of many scripts as the tokenizer of teacher.path does")


def _check_top_k(questions: Questions, limits: list[int]) -> Iterator[Check]:
    """Measure the largest top-k that really comes, and add it to `limits`: servers may ignore flags."""
    limits += [_top_k_of(questions.at(url)) for url in questions.urls]
    limit, most = min(limits), min(_MOST_TOP_K, questions.vocab_size)
    said = f"they give the top-{limit}{' and more' if limit == most else ''}, and the ids of all tokens come back"
    if limit < questions.top_k:
        yield error(
            "servers: top-k",
            f"{said}, but the method reads the top-{questions.top_k}.",
            questions.dialect.top_k_advice(questions.top_k, f"set method.top_k = {limit}"),
        )
    else:
        yield ok("servers: top-k", f"{said}; the method reads {questions.top_k}")


def _top_k_of(questions: Questions) -> int:
    def gives(top_k: int) -> bool:
        try:
            questions.score([questions.text[:3]], top_k=top_k)
        except (ServerRefused, ServerGarbled):
            return False
        return True

    questions.score([questions.text[:3]], top_k=1)  # whatever fails here has nothing to do with top-k
    low, high = 1, min(_MOST_TOP_K, questions.vocab_size) + 1
    for probe in (questions.top_k, 2 * low, 16, 64, 256, high - 1):
        if low < probe < high:
            low, high = (probe, high) if gives(probe) else (low, probe)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gives(middle) else (low, middle)
    return low


def _check_lengths(questions: Questions, subject: Subject) -> Iterator[Check]:
    """Score one text of the run's greatest length, then as many as fit: context, memory and speed."""
    run = subject.run
    needed = max((len(prompt.token_ids) for prompt in subject.prompts), default=1) + run.rollout.max_new_tokens
    if needed > questions.room:
        yield warning(
            "servers: context",
            f"the longest prompt and answer have {needed} tokens, but the servers hold {questions.room + 1} and write "
            "one themselves: longer prompts are skipped.",
            f"Start them with {questions.dialect.context_flag} {needed + 1}.",
        )
        needed = questions.room
    else:
        yield ok(
            "servers: context",
            f"{needed} tokens are needed, and one to write; they hold {questions.card.max_model_len}",
        )
    text = (questions.text * (needed // len(questions.text) + 1))[:needed]
    each_step = run.rollout.num_prompts * run.rollout.num_rollouts
    number = min(each_step, 8 * len(questions.urls), questions.vocab_size - 1)
    questions.score([(0, *text[1:])], top_k=questions.top_k)
    started = time.perf_counter()
    questions.score([(first, *text[1:]) for first in range(1, number + 1)], top_k=questions.top_k)
    speed = number * needed / (time.perf_counter() - started)
    yield ok(
        "servers: speed",
        f"{speed:,.0f} tokens per second with the top-{questions.top_k} ({number} texts of {needed} tokens); scoring "
        f"a step of longest texts takes about {each_step * needed / speed:.2g} seconds",
    )
