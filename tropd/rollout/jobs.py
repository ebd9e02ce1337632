"""Requests to a server that holds the student: write a text, and score a known one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from tropd.errors import EngineError, ServerRefused
from tropd.rollout import canary
from tropd.servers.dialect import Dialect
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.types import Completion, Request, Sampling

_CANARY = "a known text"


@dataclass(frozen=True, kw_only=True)
class ServedStudent:
    """The student on the servers."""

    model: str
    """Its name in requests."""
    version: int
    """The version of its weights."""
    vocab_size: int
    """How many token ids it shares with the teacher."""


def text_job(dialect: Dialect, request: Request, name: str, student: ServedStudent) -> Job[Completion]:
    """One completion.  Log-probabilities come at temperature 1 without truncation, where all servers agree
    on their meaning; texts drawn with other settings have none."""
    neutral = request.sampling == Sampling()

    def check(text: Completion) -> Completion:
        if max(text.token_ids) >= student.vocab_size:
            raise EngineError(
                f"the server wrote token {max(text.token_ids)}, but student and teacher share {student.vocab_size}: "
                "the padding of the student's head has probability. Use a student whose head is trained."
            )
        known = text.behavior_logprobs if neutral else ()
        if neutral and not known:
            raise ServerRefused(f"{name}: log-probabilities were asked for, and none came.")
        version = (student.version, student.version)
        return replace(text, behavior_logprobs=known, model_logprobs=known, policy_version=version)

    return dialect.text_job(name, student.model, request, logprobs=neutral).then(check)


def draw_after(pool: Pool, text: Sequence[int], seeds: Sequence[int], student: ServedStudent) -> list[int]:
    """Single tokens that the server draws after a text."""
    requests = [Request(token_ids=tuple(text), max_new_tokens=1, seed=seed) for seed in seeds]
    dialect = dialect_of(pool.settings)
    texts = pool.run([text_job(dialect, request, _CANARY, student) for request in requests])
    return [text.token_ids[0] for text in texts]


def score_canary(pool: Pool, text: Sequence[int], student: ServedStudent) -> canary.Found:
    """The log-probabilities of a known text on the server of a pool."""
    dialect = dialect_of(pool.settings)
    ((scored,),) = pool.run([dialect.score_job(_CANARY, student.model, [text], [1], 0)])
    after = Request(token_ids=tuple(text), max_new_tokens=1, seed=1)
    (written,) = pool.run([text_job(dialect, after, _CANARY, student)])
    return canary.Found(logprobs=scored.logprobs, written=written)
