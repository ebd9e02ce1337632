"""Whether a teacher's servers tell the truth, as far as their answers show.

repeats, replicas   the same text again, among others, and from every server
own texts           texts that the server writes: its log-probability of each token when drawn, and when scored
draws               the drawn tokens against the probabilities that the server gave them
prefix cache        a beginning, its half, and several texts that continue it
temperature         the same text with another temperature in the request
parity              a forward pass in this process, if the weights are in a local folder

The checks cost some hundred tokens.  The texts that a server wrote and their scores are kept (`Known`), and
`tropd.teachers.watch` asks about them again after every batch.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from tropd.config.models import base_url
from tropd.errors import ServerGarbled
from tropd.rollout import draws
from tropd.servers.answers import Scored
from tropd.teachers.gaps import gap_of, part
from tropd.teachers.questions import Questions
from tropd.types import Request, key_of

NOISE = 0.02
"""Nats per token below which half precision usually stays; more is a warning."""
_REPEATS = 3
_BLOCKS = 400
"""Tokens of a beginning that is long enough for prefix caches, which hold blocks of 16 to 128."""
_NUM_PAIRS, _NUM_TOKENS, _START = 4, 32, 24
"""Pairs of the server's texts with a common beginning, the tokens of each text, and those of a short beginning."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The result of one check."""

    name: str
    level: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Known:
    """Texts, and the known scores of their tokens from `first` on."""

    texts: list[tuple[int, ...]]
    first: int
    rows: list[Scored]
    """Scores of the tokens from `first` on."""


def audit(questions: Questions, reference: Known | None = None) -> tuple[list[Finding], dict[str, Known]]:
    """All checks of all servers, and each server's scores of its own texts.  `reference` scores texts with a forward
    pass in this process."""
    findings = [*repeats(questions), *temperature(questions)]
    known: dict[str, Known] = {}
    for url in questions.urls:
        more, known[url] = examine(questions.at(url), reference)
        findings += more
    return findings, known


def examine(questions: Questions, reference: Known | None = None) -> tuple[list[Finding], Known]:
    """The checks of one server, which may just have been restarted."""
    size = min(_NUM_TOKENS, questions.room // 2)
    salt, length = random.SystemRandom(), min(_BLOCKS, questions.room - size)
    if size < 1:
        return [], Known(texts=[], first=1, rows=[])
    beginning = tuple(salt.choice(questions.text) for _ in range(length))
    fresh = questions.score([beginning])[0] if length > 1 else None
    short = [tuple(salt.choice(questions.text) for _ in range(min(_START, length))) for _ in range(_NUM_PAIRS - 1)]
    starts = [start for start in (beginning, *short) for _ in range(2)]
    requests = [
        Request(token_ids=start, max_new_tokens=size, seed=key_of(0, "own text", n)) for n, start in enumerate(starts)
    ]
    written = questions.write(requests)
    texts = [(*start, *text.token_ids) for start, (text, _) in zip(starts, written, strict=True)]
    scored = questions.score(texts)
    now = [part(row, len(start) - 1, len(start) - 1 + size) for start, row in zip(starts, scored, strict=True)]
    findings: list[Finding] = []
    if fresh is not None:
        again = questions.score([beginning, beginning[: max(2, length // 2)]])
        findings += _prefixes(questions, fresh, [*(part(row, 0, length - 1) for row in scored[:2]), *again])
    findings += [*_own_texts(questions, [row for _, row in written], now), *_draws(questions, written, now)]
    if reference is not None:
        findings += parity(questions, reference)
    return findings, Known(texts=texts[2:], first=len(short[0]), rows=now[2:])


def repeats(questions: Questions) -> Iterator[Finding]:
    """The same request, again and among others; then to every server."""
    text = questions.text
    others = [text[n:] for n in range(1, 5) if len(text) > n + 1]
    first = {url: questions.at(url).score([text])[0] for url in questions.urls}
    for url, alone in first.items():
        again = [questions.at(url).score([*others, text])[-1] for _ in range(_REPEATS)]
        said = f"{base_url(url)}: the same text, {_REPEATS} times among others"
        cure = "--dtype float32, or batch-invariant kernels, lower it."
        yield judged(questions, "repeats", said, [alone] * _REPEATS, again, ("first", "again"), cure)
    if len(first) > 1:
        said = f"{len(first)} servers about the same text"
        rows, cure = list(first.values()), "Same weights, dtype and version everywhere."
        yield judged(questions, "replicas", said, rows[:1] * len(rows), rows, ("the first", "another"), cure)


def temperature(questions: Questions) -> Iterator[Finding]:
    """Log-probabilities of a text have no temperature; a server that processes them gives those of another model."""
    if not questions.dialect.raw_flag:
        return
    plain, hot = questions.score([questions.text]), questions.score([questions.text], temperature=0.5)
    gap = gap_of(plain, hot, questions.settings.nats_for(), ("1", "0.5"))
    if gap.mean > NOISE:
        yield Finding(
            name="temperature",
            level="warning",
            found=f"log-probabilities depend on the temperature of the request, by {gap.mean:.2g} nats per token; "
            "tropd asks at 1, but the server processes them.",
            advice=f"Start them with {questions.dialect.raw_flag}.",
        )
    else:
        said = f"log-probabilities are the same at any temperature ({gap.most:.2g} nats)"
        yield Finding(name="temperature", level="ok", found=said)


def parity(questions: Questions, reference: Known) -> Iterator[Finding]:
    scored = questions.score(reference.texts)
    said = "a forward pass of teacher.path in this process"
    cure = "Compare teacher.path with what is served: weights, dtype, quantisation, a token added at the beginning."
    found = [part(row, reference.first - 1, len(row.logprobs)) for row in scored]
    yield judged(questions, "parity", said, reference.rows, found, ("here", "server"), cure)


def refuse(findings: Sequence[Finding]) -> list[str]:
    """Raise the first error among the findings; returns the notes."""
    for finding in findings:
        if finding.level == "error":
            raise ServerGarbled(f"{finding.name}: {finding.found} {finding.advice}".rstrip())
    return [f"servers: {f.name}: {f.found} {f.advice}".rstrip() for f in findings if f.level == "warning"]


def judged(
    questions: Questions,
    name: str,
    said: str,
    expected: Sequence[Scored],
    found: Sequence[Scored],
    names: tuple[str, str],
    cure: str,
) -> Finding:
    gap = gap_of(expected, found, questions.settings.nats_for(), names)
    said = f"{said}: {gap.mean:.2g} nats per token apart, {gap.most:.2g} at most"
    if gap.objection:
        found_ = f"{said}, as much as distillation learns from.\n  {gap.objection}\n"
        return Finding(name=name, level="error", found=found_, advice=cure)
    if gap.mean > NOISE:
        return Finding(
            name=name, level="warning", found=f"{said}. Such noise is added to every log-ratio.", advice=cure
        )
    return Finding(name=name, level="ok", found=said)


def _own_texts(questions: Questions, drawn: list[Scored], scored: list[Scored]) -> Iterator[Finding]:
    said = f"{base_url(questions.urls[0])}: {len(drawn)} texts of its own, when it drew them and when it scores them"
    cure = "Temperature, penalties, log-probabilities that are processed (--logprobs-mode), or another model's scores."
    yield judged(questions, "own texts", said, drawn, scored, ("drawn", "scored"), cure)


def _draws(questions: Questions, written: Sequence, scored: list[Scored]) -> Iterator[Finding]:
    texts = [text.token_ids for text, _ in written]
    rows = zip(texts, scored, strict=True)
    found = draws.total(draws.evidence_of_rows(ids, x.logprobs, x.topk_ids_TK, x.topk_logprobs_TK) for ids, x in rows)
    said = f"{base_url(questions.urls[0])}: {sum(map(len, texts))} tokens that it drew at temperature 1"
    pairs = [slice(n, n + 2) for n in range(0, len(texts), 2)]
    same = max(draws.coincidence(texts[pair], [row.logprobs for row in scored[pair]]) for pair in pairs)
    if (how := draws.explained(found)) is not None:
        yield Finding(
            name="draws",
            level="error",
            found=f"{said} look drawn {how}, by {found[how]:.0f} nats of evidence: its log-probabilities are not those "
            "that it draws with.",
            advice="Look for sampling settings on the server that override those of the request, and for "
            "log-probabilities that are scaled.",
        )
    elif same > draws.ENOUGH:
        yield Finding(
            name="draws",
            level="error",
            found=f"{said}: two texts with different seeds are the same, against odds of {same:.0f} nats.",
            advice="The server ignores seeds, or takes the likeliest tokens.",
        )
    else:
        yield Finding(name="draws", level="ok", found=f"{said} agree with its log-probabilities")


def _prefixes(questions: Questions, fresh: Scored, others: list[Scored]) -> Iterator[Finding]:
    said = (
        f"texts that share a beginning, and the first time that {len(fresh.logprobs) + 1} tokens of it were asked about"
    )
    whole = [part(fresh, 0, len(other.logprobs)) for other in others]
    cure = "Start them with --no-enable-prefix-caching."
    yield judged(questions, "prefix cache", said, whole, others, ("first", "then"), cure)
