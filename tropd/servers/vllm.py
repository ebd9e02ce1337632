"""Requests to vLLM, and checks of its answers.

A scoring request holds two texts: a canary whose log-probabilities are known, and the sequence to score.  The same
process answers both, so each answer proves which model gave it.  vLLM puts, at each position, the written
token and the k likeliest with their ranks; nothing is there at position 0.  It writes -9999 where it has no number,
and a softmax gives every token one, so that is refused.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NotRequired

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from tropd.errors import ServerGarbled
from tropd.objective.evidence import Needs
from tropd.servers.answers import ROUNDING, Logprob, Row, Scored, TokenId, check_echo, joined, parsed
from tropd.servers.dialect import Dialect, score_limit, text_limit
from tropd.servers.pool import Job
from tropd.servers.vllm_weights import VllmWeights
from tropd.types import Completion, Finish, Request

_ROUTE = "/v1/completions"
_NO_NUMBER = -9999.0
_STRICT = ConfigDict(strict=True, extra="ignore")


class _Entry(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    logprob: Logprob
    rank: Annotated[int, Field(ge=1)]


class _ScoredChoice(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    index: int
    prompt_token_ids: list[TokenId]
    prompt_logprobs: list[dict[TokenId, _Entry] | None]


class _Usage(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    prompt_tokens: int


class _ScoredAnswer(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: str
    model: str
    choices: list[_ScoredChoice]
    usage: NotRequired[_Usage | None]


class _Sampled(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    tokens: list[str]
    token_logprobs: list[Logprob]
    top_logprobs: NotRequired[list[dict[str, Logprob] | None] | None]


class _WrittenChoice(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    index: int
    prompt_token_ids: list[TokenId]
    token_ids: list[TokenId]
    finish_reason: str
    logprobs: _Sampled | None


class _WrittenAnswer(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: str
    model: str
    choices: list[_WrittenChoice]


_SCORED = TypeAdapter(_ScoredAnswer)
_WRITTEN = TypeAdapter(_WrittenAnswer)


class Vllm(Dialect):
    """Token ids in and out; takes weights while it runs."""

    kind = "vllm"
    goes_on = {"continue_final_message": True, "add_generation_prompt": False}  # noqa: RUF012
    capabilities = Needs.SAMPLED | Needs.TOPK
    weights = VllmWeights()
    program = ("vllm", "serve")
    top_k_flag, context_flag, raw_flag = "--max-logprobs", "--max-model-len", "--logprobs-mode raw_logprobs"

    def score_job(
        self,
        name: str,
        model: str,
        sequences: Sequence[Sequence[int]],
        firsts: Sequence[int],
        top_k: int,
        temperature: float = 1.0,
    ) -> Job[list[Scored]]:
        how: dict[str, Any] = {"model": model, "sequences": sequences, "firsts": firsts, "top_k": top_k}
        num_tokens = sum(map(len, sequences)) + len(sequences)
        return Job(
            name=name,
            path=_ROUTE,
            body=_score_body(model, sequences, top_k, temperature),
            read=lambda answer, request_id: _read_scores(answer, request_id=request_id, **how),
            num_tokens=num_tokens,
            limit_bytes=score_limit(num_tokens, top_k),
        )

    def text_job(self, name: str, model: str, request: Request, *, logprobs: bool = False) -> Job[Completion]:
        return self._text_job(name, model, request, 0 if logprobs else None).then(lambda text: text[0])

    def own_text_job(self, name: str, model: str, request: Request, top_k: int) -> Job[tuple[Completion, Scored]]:
        job = self._text_job(name, model, request, top_k)
        return job.then(lambda text: (text[0], _rows_of(*text, top_k)))

    def _text_job(
        self, name: str, model: str, request: Request, top_k: int | None
    ) -> Job[tuple[Completion, _Sampled | None]]:
        return Job(
            name=name,
            path=_ROUTE,
            body=_text_body(model, request, top_k=top_k),
            read=lambda answer, request_id: _read_text(answer, model, request, request_id),
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=text_limit(request, top_k or 0),
        )


def _score_body(model: str, sequences: Sequence[Sequence[int]], top_k: int, temperature: float) -> dict[str, Any]:
    """Sampling does not affect prompts; it is explicit because servers would apply a model's own settings."""
    return {
        "model": model,
        "prompt": [list(sequence) for sequence in sequences],
        "max_tokens": 1,
        "prompt_logprobs": top_k,
        "return_token_ids": True,
        "add_special_tokens": False,
        "temperature": temperature,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
    }


def _read_scores(
    answer: bytes, *, model: str, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top_k: int, request_id: str
) -> list[Scored]:
    """The scores of each sequence from `firsts` on.  Anything missing, odd or about other tokens is refused."""
    found = parsed(_SCORED, answer)
    choices = _in_order(found, model, len(sequences), request_id)
    read, asked = (found.get("usage") or {}).get("prompt_tokens"), sum(map(len, sequences))
    if read not in (None, asked):
        raise ServerGarbled(f"{asked} tokens were asked about, and {read} were read. Does it add one at the beginning?")
    return [
        _scored(choice, sequence, first, top_k)
        for choice, sequence, first in zip(choices, sequences, firsts, strict=True)
    ]


def _text_body(model: str, request: Request, *, top_k: int | None = None) -> dict[str, Any]:
    """Stop tokens are only those of the request, and part of the text.  `top_k` requests log-probabilities of the
    written tokens and of that many likely ones."""
    sampling = request.sampling
    return {
        "model": model,
        "prompt": list(request.token_ids),
        "max_tokens": request.max_new_tokens,
        "seed": request.seed if request.seed != -1 else 2**63 - 1,  # -1 would be no seed at all
        "stop_token_ids": list(request.stop_ids),
        "ignore_eos": True,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "add_special_tokens": False,
        "skip_special_tokens": False,
        "logprobs": top_k,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
    }


def _rows_of(text: Completion, sampled: _Sampled | None, top_k: int) -> Scored:
    """The server's scores of each token when it drew the token."""
    rows = (sampled or {}).get("top_logprobs") or []
    if not text.behavior_logprobs or len(rows) != len(text.token_ids):
        raise ServerGarbled(f"a text of {len(text.token_ids)} tokens came with {len(rows)} rows of log-probabilities.")
    pairs = zip(text.behavior_logprobs, rows, strict=True)
    return joined([(logprob, _likeliest(row or {}, top_k)) for logprob, row in pairs])


def _likeliest(row: Mapping[str, float], top_k: int) -> list[tuple[int, float]]:
    try:
        named = [(int(name.removeprefix("token_id:")), _logprob(x)) for name, x in row.items()]
    except ValueError:
        raise ServerGarbled("the likely tokens of a text are not named by their ids.") from None
    if len(named) < top_k:
        raise ServerGarbled(f"the top-{top_k} of a text was asked for, and {len(named)} came.")
    return sorted(named, key=lambda pair: -pair[1])[:top_k]


def _read_text(answer: bytes, model: str, request: Request, request_id: str) -> tuple[Completion, _Sampled | None]:
    (choice,) = _in_order(parsed(_WRITTEN, answer), model, 1, request_id)
    check_echo(choice["prompt_token_ids"], request.token_ids)
    ids = tuple(choice["token_ids"])
    ends = [place for place, token in enumerate(ids) if token in request.stop_ids]
    finish = {"stop": Finish.STOP, "length": Finish.LENGTH}.get(choice["finish_reason"])
    whole = ends == [len(ids) - 1] if finish is Finish.STOP else not ends and len(ids) == request.max_new_tokens
    if finish is None or not whole or not ids:
        raise ServerGarbled(
            f"a text of {len(ids)} tokens (at most {request.max_new_tokens} were asked for) with stop tokens at {ends} "
            f"ended for the reason {choice['finish_reason']!r}: that cannot be."
        )
    sampled = choice["logprobs"]
    if sampled is None:
        return Completion(token_ids=ids, behavior_logprobs=(), model_logprobs=(), finish=finish), None
    if sampled["tokens"] != [f"token_id:{token}" for token in ids] or len(sampled["token_logprobs"]) != len(ids):
        raise ServerGarbled("the log-probabilities of a text are those of other tokens.")
    logprobs = tuple(_logprob(x) for x in sampled["token_logprobs"])
    return Completion(token_ids=ids, behavior_logprobs=logprobs, model_logprobs=(), finish=finish), sampled


def _in_order(found: Any, model: str, number: int, request_id: str) -> list[Any]:
    if found["model"] != model:
        raise ServerGarbled(f"model {model!r} was asked, and {found['model']!r} answered.")
    if found["id"] != f"cmpl-{request_id}":
        raise ServerGarbled(f"the answer to another request came back ({found['id']!r}).")
    choices = sorted(found["choices"], key=lambda choice: choice["index"])
    if [choice["index"] for choice in choices] != list(range(number)):
        raise ServerGarbled(f"{number} texts were asked about, and {len(choices)} answered.")
    return choices


def _scored(choice: _ScoredChoice, sequence: Sequence[int], first: int, top_k: int) -> Scored:
    check_echo(choice["prompt_token_ids"], sequence)
    rows = choice["prompt_logprobs"]
    if len(rows) != len(sequence) or (rows and rows[0] is not None):
        raise ServerGarbled(f"{len(sequence)} tokens came back with {len(rows)} rows of log-probabilities.")
    return joined([_read_row(rows[at], sequence[at], at, top_k) for at in range(max(first, 1), len(sequence))])


def _read_row(row: dict[int, _Entry] | None, written: int, place: int, top_k: int) -> Row:
    """Read one row.  The written token has a separate entry unless it is one of the likeliest."""
    if row is None or written not in row:
        raise ServerGarbled(f"position {place} has no log-probability for the token {written} that stands there.")
    own = row[written]
    top = sorted((entry["rank"], token, entry["logprob"]) for token, entry in row.items() if entry["rank"] <= top_k)
    if len(top) > top_k:  # as likely as the last of them, so it may bear its rank as well
        top = [entry for entry in top if entry[1] != written]
    apart = all(token != written for _, token, _ in top)
    if [rank for rank, _, _ in top] != list(range(1, len(top) + 1)) or len(row) != len(top) + apart:
        raise ServerGarbled(f"position {place}: {len(row)} tokens do not make the top-{top_k} and the written one.")
    if len(top) < top_k:
        raise ServerGarbled(
            f"position {place}: the top-{top_k} was asked for, and {len(top)} came. Start the server with "
            f"--max-logprobs {top_k}, or lower top_k."
        )
    logprobs = [logprob for _, _, logprob in top]
    falls = all(a >= b for a, b in itertools.pairwise(logprobs))
    mass = math.fsum(math.exp(x) for x in logprobs)
    beside = math.exp(own["logprob"]) if apart else 0.0
    likelier = apart and bool(top) and own["logprob"] > logprobs[-1] + ROUNDING
    if not falls or likelier or mass + beside > 1.0 + ROUNDING:
        raise ServerGarbled(f"position {place}: the log-probabilities make no distribution.")
    return _logprob(own["logprob"]), [(token, _logprob(x)) for _, token, x in top]


def _logprob(x: float) -> float:
    if x <= _NO_NUMBER:
        raise ServerGarbled(f"a token has the log-probability {x:g}, which vLLM writes where it has no number.")
    return min(x, 0.0)
