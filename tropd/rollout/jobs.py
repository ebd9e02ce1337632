"""What a server that holds the student is asked: to write a text, and what it makes of a known one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from tropd.errors import EngineError, ServerRefused
from tropd.rollout import canary
from tropd.servers.dialect import Dialect
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.types import Completion, Request, Sampling

_CANARY = "a known text"


def text_job(
    dialect: Dialect, request: Request, name: str, *, model: str, version: int, vocab_size: int
) -> Job[Completion]:
    """One completion, written with the weights of `version`.  Log-probabilities are those of temperature 1 without
    truncation, where every server means the same by them; texts drawn otherwise come without."""
    neutral = request.sampling == Sampling()

    def check(text: Completion) -> Completion:
        if max(text.token_ids) >= vocab_size:
            raise EngineError(
                f"the server wrote token {max(text.token_ids)}, but student and teacher share {vocab_size}: "
                "the padding of the student's head has probability. Use a student whose head is trained."
            )
        known = text.behavior_logprobs if neutral else ()
        if neutral and not known:
            raise ServerRefused(f"{name}: log-probabilities were asked for, and none came.")
        return replace(text, behavior_logprobs=known, model_logprobs=known, policy_version=(version, version))

    return dialect.text_job(name, model, request, logprobs=neutral).then(check)


def draw_after(
    pool: Pool, text: Sequence[int], seeds: Sequence[int], *, model: str, version: int, vocab_size: int
) -> list[int]:
    """Single tokens that the server draws after a text."""
    requests = [Request(token_ids=tuple(text), max_new_tokens=1, seed=seed) for seed in seeds]
    how: dict[str, Any] = {"model": model, "version": version, "vocab_size": vocab_size}
    dialect = dialect_of(pool.settings)
    texts = pool.run([text_job(dialect, request, _CANARY, **how) for request in requests])
    return [text.token_ids[0] for text in texts]


def score_canary(pool: Pool, text: Sequence[int], *, model: str, version: int, vocab_size: int) -> canary.Found:
    """What the server of a pool makes of a known text."""
    dialect = dialect_of(pool.settings)
    ((scored,),) = pool.run([dialect.score_job(_CANARY, model, [text], [1], 0)])
    after = Request(token_ids=tuple(text), max_new_tokens=1, seed=1)
    (written,) = pool.run([text_job(dialect, after, _CANARY, model=model, version=version, vocab_size=vocab_size)])
    return canary.Found(logprobs=scored.logprobs, written=written)
