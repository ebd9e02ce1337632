"""What the teacher's servers are really like: measured with a few requests, before a run depends on it."""

from __future__ import annotations

import dataclasses
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.cost import free_memory
from tropd.doctor.subject import Side, Subject
from tropd.doctor.ward import Ward, gap_of, ward_of
from tropd.errors import ServerError, ServerGarbled, ServerRefused, TeacherError, TropdError
from tropd.servers.client import Client
from tropd.servers.settings import ServerConfig, base_url, check_addresses
from tropd.student.models import load_model
from tropd.teachers.meeting import card_of
from tropd.teachers.served import compare_tokenizers
from tropd.teachers.server import CAPABILITIES

_NOISE, _LOUD = 0.02, 0.2
"""Mean nats between two answers to the same question: half precision stays below the first; the second is as large as
the signal that distillation learns from."""
_REPEATS = 3
_MOST_TOP_K = 1024
_PATIENCE = 20.0
"""Seconds for a server that does not answer.  A run waits longer, because servers may still be starting then."""
_BLOCKS = 400
"""Tokens of a text that prefix caches keep: they hold blocks of 16 to 128."""


def check_essentials(subject: Subject) -> Iterator[Check]:
    """What changes scores silently.  A run has met its servers before: identity, tokenizer and top-k were compared."""
    config = subject.run.teacher
    if config.servers and subject.teacher is not None and CAPABILITIES[config.server.kind]:
        card = card_of(config.servers, config.server)
        yield from _check_answers(ward_of(subject, config.server, card, subject.teacher), _ESSENTIAL)


def check_servers(subject: Subject, *, weights: bool) -> Iterator[Check]:
    """From whether they answer to how fast; what depends on an answer that is missing is left out.  `weights`: compare
    with a forward pass in this process where the teacher's weights are at hand."""
    config, teacher = subject.run.teacher, subject.teacher
    if not config.servers or teacher is None:
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
    tokenizers = list(_check_tokenizers(config.servers, settings, card.id, teacher))
    yield from tokenizers
    if not CAPABILITIES[settings.kind]:
        yield ok("servers: scores", f"a server of kind {settings.kind!r} gives none; it can write texts")
        return
    if any(check.level == "error" for check in tokenizers):
        return
    ward = ward_of(subject, settings, card, teacher)
    limits: list[int] = []
    yield from _check_answers(ward, [lambda ward: _check_top_k(ward, limits)])
    if limits:
        looks = [*_ESSENTIAL, *([lambda ward: _check_parity(ward, subject)] if weights else [])]
        ward = dataclasses.replace(ward, top_k=min(ward.top_k, *limits))
        yield from _check_answers(ward, [*looks, lambda ward: _check_lengths(ward, subject)])


def _check_answers(ward: Ward, looks: Sequence[Callable[[Ward], Iterator[Check]]]) -> Iterator[Check]:
    try:
        for look in looks:
            yield from look(ward)
    except (ServerError, TeacherError) as failure:
        yield error("servers: answers", str(failure), "Look at the server's own log.")


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


def _check_top_k(ward: Ward, limits: list[int]) -> Iterator[Check]:
    """The largest that is really given, which is added to `limits`: flags have been known to be ignored."""
    limits += [_top_k_of(ward, url) for url in ward.urls]
    limit, most = min(limits), min(_MOST_TOP_K, ward.vocab_size)
    said = f"they give the top-{limit}{' and more' if limit == most else ''}, and the ids of all tokens come back"
    if limit < ward.top_k:
        yield error(
            "servers: top-k",
            f"{said}, but the method reads the top-{ward.top_k}.",
            f"Start them with --max-logprobs {ward.top_k}, or set method.top_k = {limit}.",
        )
    else:
        yield ok("servers: top-k", f"{said}; the method reads {ward.top_k}")


def _top_k_of(ward: Ward, url: str) -> int:
    def gives(top_k: int) -> bool:
        try:
            ward.score([ward.text[:3]], urls=[url], top_k=top_k)
        except (ServerRefused, ServerGarbled):
            return False
        return True

    ward.score([ward.text[:3]], urls=[url])  # whatever fails here has nothing to do with top-k
    low, high = 1, min(_MOST_TOP_K, ward.vocab_size) + 1
    for probe in (ward.top_k, 2 * low, 16, 64, 256, high - 1):
        if low < probe < high:
            low, high = (probe, high) if gives(probe) else (low, probe)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if gives(middle) else (low, middle)
    return low


def _check_repeats(ward: Ward) -> Iterator[Check]:
    """The same question, again and among others; then every server."""
    others = [ward.text[n:] for n in range(1, 5)]
    first = [ward.score([ward.text], urls=[url])[0] for url in ward.urls]
    for url, alone in zip(ward.urls, first, strict=True):
        again = [ward.score([*others, ward.text], urls=[url])[-1] for _ in range(_REPEATS)]
        mean, most = gap_of(torch.stack(again), alone)
        said = f"{base_url(url)}: the same text, {_REPEATS} times among others, differs by {mean:.2g} nats per token"
        yield _judged("servers: repeats", mean, most, said, "--dtype float32, or batch-invariant kernels, lower it.")
    if len(ward.urls) > 1:
        mean, most = gap_of(torch.stack(first), first[0])
        said = f"{len(ward.urls)} servers differ by {mean:.2g} nats per token about the same text"
        yield _judged("servers: replicas", mean, most, said, "Same weights, dtype and version everywhere.")


def _check_prefixes(ward: Ward) -> Iterator[Check]:
    """A beginning that nobody has asked for before, whole texts and parts of them: a prefix cache must not show."""
    salt, size = random.SystemRandom(), min(_BLOCKS, ward.room)
    mean, most = 0.0, 0.0
    for url in ward.urls:
        whole = [salt.choice(ward.text) for _ in range(size)]
        half = whole[: size // 2]
        fresh = ward.score([whole], urls=[url])[0]
        part = ward.score([half], urls=[url])[0]
        again = ward.score([whole], urls=[url])[0]
        for a, b in ((fresh[: len(part)], part), (fresh, again)):
            gaps = gap_of(a, b)
            mean, most = max(mean, gaps[0]), max(most, gaps[1])
    said = f"texts that share a beginning differ by {mean:.2g} nats per token from the first time they were asked"
    # A wrong beginning shows in few tokens, but plainly there.
    yield _judged("servers: prefix cache", mean, most, said, "Start them with --no-enable-prefix-caching.", far=1.0)


def _check_temperature(ward: Ward) -> Iterator[Check]:
    """Log-probabilities of a text have no temperature; a server that processes them gives those of another model."""
    if ward.settings.kind != "vllm":
        return
    plain, hot = ward.score([ward.text])[0], ward.score([ward.text], temperature=0.5)[0]
    mean, most = gap_of(plain, hot)
    if mean > _NOISE:
        yield warning(
            "servers: temperature",
            f"log-probabilities depend on the temperature of the request, by {mean:.2g} nats per token; tropd asks at "
            "1, but the server processes them.",
            "Start them with --logprobs-mode raw_logprobs.",
        )
    else:
        yield ok("servers: temperature", f"log-probabilities are the same at any temperature ({most:.2g} nats)")


_ESSENTIAL = (_check_repeats, _check_prefixes, _check_temperature)


def _check_parity(ward: Ward, subject: Subject) -> Iterator[Check]:
    """Against transformers, in this process, where the weights are in a folder and fit twice."""
    config = subject.run.teacher
    files = list(Path(config.path).glob("*.safetensors")) if Path(config.path).is_dir() else []
    size, free = sum(file.stat().st_size for file in files), free_memory(torch.device("cpu"))
    if not files or (free is not None and 4 * size > free):
        yield ok("servers: parity", "not compared with a forward pass here: the weights are not at hand, or do not fit")
        return
    model = load_model(config, "teacher", torch.device("cpu"))
    ids = torch.tensor([ward.text])
    with torch.no_grad():
        logprobs_TV = model(ids).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs_TV.gather(1, ids[0, 1:, None])[:, 0]
    mean, most = gap_of(ward.score([ward.text])[0], expected)
    said = f"a forward pass of teacher.path in this process differs by {mean:.2g} nats per token"
    cure = "Compare teacher.path with what is served: weights, dtype, quantisation."
    yield _judged("servers: parity", mean, most, said, cure)


def _check_lengths(ward: Ward, subject: Subject) -> Iterator[Check]:
    """One text as long as the longest of the run, then as many as fit: context, memory and speed."""
    run = subject.run
    needed = max((len(prompt.token_ids) for prompt in subject.prompts), default=1) + run.rollout.max_new_tokens
    if needed > ward.room:
        yield warning(
            "servers: context",
            f"the longest prompt and answer have {needed} tokens, but the servers hold {ward.room + 1} and write one "
            "themselves: longer prompts are skipped.",
            f"Start them with --max-model-len {needed + 1}.",
        )
        needed = ward.room
    else:
        yield ok(
            "servers: context", f"{needed} tokens are needed, and one to write; they hold {ward.card.max_model_len}"
        )
    text = (ward.text * (needed // len(ward.text) + 1))[:needed]
    each_step = run.rollout.num_prompts * run.rollout.num_rollouts
    number = min(each_step, 8 * len(ward.urls), ward.vocab_size - 1)
    ward.score([(0, *text[1:])], top_k=ward.top_k)
    started = time.perf_counter()
    ward.score([(first, *text[1:]) for first in range(1, number + 1)], top_k=ward.top_k)
    speed = number * needed / (time.perf_counter() - started)
    yield ok(
        "servers: speed",
        f"{speed:,.0f} tokens per second with the top-{ward.top_k} ({number} texts of {needed} tokens); scoring a step "
        f"of longest texts takes about {each_step * needed / speed:.2g} seconds",
    )


def _judged(name: str, mean: float, most: float, said: str, cure: str, far: float = math.inf) -> Check:
    said = f"{said} (at most {most:.2g})"
    if not (mean <= _LOUD and most <= far):
        return error(name, f"{said}: as much as distillation learns from.", cure)
    if mean > _NOISE:
        return warning(name, f"{said}. Such noise is added to every log-ratio.", cure)
    return ok(name, said)
