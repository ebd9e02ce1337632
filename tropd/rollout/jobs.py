"""What a vLLM server that holds the student is asked: to write a text, and what it makes of a known one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tropd.errors import EngineError, ServerRefused
from tropd.rollout import canary
from tropd.servers import vllm
from tropd.servers.pool import Job, Pool
from tropd.types import Completion, Request, Sampling

_CANARY = "a known text"


def text_job(request: Request, name: str, *, model: str, version: int, vocab_size: int) -> Job[Completion]:
    """One completion, written with the weights of `version`.  Log-probabilities are those of temperature 1 without
    truncation, where every --logprobs-mode means the same; texts drawn otherwise come without."""
    neutral = request.sampling == Sampling()

    def read(answer: bytes, request_id: str) -> Completion:
        text = vllm.read_text(answer, model=model, request=request, request_id=request_id)
        if max(text.token_ids) >= vocab_size:
            raise EngineError(
                f"the server wrote token {max(text.token_ids)}, but student and teacher share {vocab_size}: "
                "the padding of the student's head has probability. Use a student whose head is trained."
            )
        known = text.behavior_logprobs if neutral else ()
        if neutral and not known:
            raise ServerRefused(f"{name}: log-probabilities were asked for, and none came.")
        return replace(text, behavior_logprobs=known, model_logprobs=known, policy_version=(version, version))

    return Job(
        name=name,
        path=vllm.TEXT,
        body=vllm.text_body(model, request, top_k=0 if neutral else None),
        read=read,
        num_tokens=len(request.token_ids) + request.max_new_tokens,
        limit_bytes=vllm.text_limit(request),
    )


def draw_after(
    pool: Pool, text: Sequence[int], seeds: Sequence[int], *, model: str, version: int, vocab_size: int
) -> list[int]:
    """Single tokens that the server draws after a text."""
    requests = [Request(token_ids=tuple(text), max_new_tokens=1, seed=seed) for seed in seeds]
    how = {"model": model, "version": version, "vocab_size": vocab_size}
    return [found.token_ids[0] for found in pool.run([text_job(request, _CANARY, **how) for request in requests])]


def sing(pool: Pool, text: Sequence[int], *, model: str, version: int, vocab_size: int) -> canary.Found:
    """What the server of a pool makes of a known text."""

    def read(answer: bytes, request_id: str) -> list[float]:
        (scored,) = vllm.read_scores(answer, model=model, sequences=[text], firsts=[1], top_k=0, request_id=request_id)
        return scored.logprobs

    job = Job(
        name=_CANARY,
        path=vllm.SCORE,
        body=vllm.score_body(model, [text], 0),
        read=read,
        num_tokens=len(text) + 1,
        limit_bytes=vllm.score_limit(len(text), 0),
    )
    (logprobs,) = pool.run([job])
    after = Request(token_ids=tuple(text), max_new_tokens=1, seed=1)
    (written,) = pool.run([text_job(after, _CANARY, model=model, version=version, vocab_size=vocab_size)])
    return canary.Found(logprobs=logprobs, written=written)
