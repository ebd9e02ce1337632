"""Requests to SGLang's own route, and checks of its answers.

It echoes every token beside its log-probability and gives the k likeliest at each position.  It scores given ids as
well, but the same ones at every position, so it cannot answer for the student's top-k.
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
from tropd.types import Completion, Finish, Request

_ROUTE = "/generate"
_STRICT = ConfigDict(strict=False, extra="ignore")
_Own = tuple[Logprob | None, TokenId, Any]
_Top = tuple[Logprob, TokenId, Any]


class _Scores(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: str
    input_token_logprobs: Annotated[list[_Own], Field(min_length=1)]
    input_top_logprobs: list[list[_Top] | None] | None


class _ScoredAnswer(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    meta_info: _Scores


class _End(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    type: str


class _Written(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    id: str
    finish_reason: _End
    prompt_tokens: int
    output_token_logprobs: NotRequired[list[tuple[Logprob, TokenId, Any]] | None]
    output_top_logprobs: NotRequired[list[list[_Top] | None] | None]


class _WrittenAnswer(TypedDict):
    __pydantic_config__ = _STRICT  # type: ignore[misc]
    output_ids: list[TokenId]
    meta_info: _Written


_SCORED = TypeAdapter(list[_ScoredAnswer])
_WRITTEN = TypeAdapter(_WrittenAnswer)


class SGLang(Dialect):
    """Token ids in and out."""

    kind = "sglang"
    goes_on = {"continue_final_message": True}  # noqa: RUF012
    capabilities = Needs.SAMPLED | Needs.TOPK
    no_weights = "weights can be given to vLLM servers only."
    program = ("python", "-m", "sglang.launch_server", "--model-path")
    context_flag = "--context-length"

    def score_job(
        self,
        name: str,
        model: str,
        sequences: Sequence[Sequence[int]],
        firsts: Sequence[int],
        top_k: int,
        temperature: float = 1.0,
    ) -> Job[list[Scored]]:
        num_tokens = sum(map(len, sequences)) + len(sequences)
        return Job(
            name=name,
            path=_ROUTE,
            body=_score_body(sequences, top_k, temperature),
            named=_named,
            read=lambda answer, request_id: _read_scores(answer, sequences, firsts, top_k, request_id),
            num_tokens=num_tokens,
            limit_bytes=score_limit(num_tokens, top_k),
        )

    def text_job(self, name: str, model: str, request: Request, *, logprobs: bool = False) -> Job[Completion]:
        assert not logprobs, "only servers that take weights are asked for them"
        return self._text_job(name, request, None).then(lambda text: text[0])

    def own_text_job(self, name: str, model: str, request: Request, top_k: int) -> Job[tuple[Completion, Scored]]:
        return self._text_job(name, request, top_k).then(lambda text: (text[0], _rows_of(*text, top_k)))

    def _text_job(self, name: str, request: Request, top_k: int | None) -> Job[tuple[Completion, _Written]]:
        return Job(
            name=name,
            path=_ROUTE,
            body=_text_body(request, top_k),
            named=_named,
            read=lambda answer, request_id: _read_text(answer, request, request_id),
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=text_limit(request, top_k or 0),
        )


def _score_body(sequences: Sequence[Sequence[int]], top_k: int, temperature: float) -> dict[str, Any]:
    return {
        "input_ids": [list(sequence) for sequence in sequences],
        "sampling_params": {"max_new_tokens": 1, "temperature": temperature},
        "return_logprob": True,
        "logprob_start_len": 0,
        "top_logprobs_num": top_k,
        "return_text_in_logprobs": False,
    }


def _named(body: Mapping[str, Any], request_id: str) -> Mapping[str, Any]:
    """The body with an id for each text, which comes back with its answer."""
    ids = body["input_ids"]
    several = isinstance(ids[0], list)
    return {**body, "rid": [f"{request_id}-{n}" for n in range(len(ids))] if several else request_id}


def _read_scores(
    answer: bytes, sequences: Sequence[Sequence[int]], firsts: Sequence[int], top_k: int, request_id: str
) -> list[Scored]:
    """The scores of each sequence from `firsts` on.  Answers name no model; the canary proves it."""
    found = parsed(_SCORED, answer)
    if len(found) != len(sequences):
        raise ServerGarbled(f"{len(sequences)} texts were asked about, and {len(found)} answered.")
    for n, part in enumerate(found):
        _check_id(part["meta_info"]["id"], f"{request_id}-{n}")
    return [_scored(f["meta_info"], ids, at, top_k) for f, ids, at in zip(found, sequences, firsts, strict=True)]


def _text_body(request: Request, top_k: int | None) -> dict[str, Any]:
    sampling = request.sampling
    wanted = {} if top_k is None else {"return_logprob": True, "top_logprobs_num": top_k}
    return {
        **wanted,
        "input_ids": list(request.token_ids),
        "sampling_params": {
            "max_new_tokens": request.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k or -1,
            "min_p": sampling.min_p,
            "stop_token_ids": list(request.stop_ids),
            "ignore_eos": True,
            "sampling_seed": request.seed & (2**31 - 1),
            "skip_special_tokens": False,
        },
    }


def _rows_of(text: Completion, meta: _Written, top_k: int) -> Scored:
    """The server's scores of each token when it drew the token."""
    own, tops = meta.get("output_token_logprobs") or [], meta.get("output_top_logprobs") or [[]] * len(text.token_ids)
    if [token for _, token, _ in own] != list(text.token_ids) or len(tops) != len(own):
        raise ServerGarbled(f"a text of {len(text.token_ids)} tokens came with {len(own)} log-probabilities.")
    rows = [
        _likeliest(place, logprob, token, tops[place] or [], top_k) for place, (logprob, token, _) in enumerate(own)
    ]
    return joined(rows)


def _read_text(answer: bytes, request: Request, request_id: str) -> tuple[Completion, _Written]:
    found = parsed(_WRITTEN, answer)
    ids, reason = tuple(found["output_ids"]), found["meta_info"]["finish_reason"]["type"]
    _check_id(found["meta_info"]["id"], request_id)
    if found["meta_info"]["prompt_tokens"] != len(request.token_ids):
        raise ServerGarbled("the text continues another prompt than the one that was sent.")
    ends = [place for place, token in enumerate(ids) if token in request.stop_ids]
    stopped, cut = reason == "stop" and ends == [len(ids) - 1], reason == "length" and not ends
    if not ids or not (stopped or (cut and len(ids) == request.max_new_tokens)):
        raise ServerGarbled(f"a text of {len(ids)} tokens with stop tokens at {ends} ended for the reason {reason!r}.")
    finish = Finish.STOP if stopped else Finish.LENGTH
    return Completion(token_ids=ids, behavior_logprobs=(), model_logprobs=(), finish=finish), found["meta_info"]


def _check_id(found: str, asked: str) -> None:
    if found != asked:
        raise ServerGarbled(f"the answer to another request came back ({found!r}).")


def _scored(meta: _Scores, sequence: Sequence[int], first: int, top_k: int) -> Scored:
    own = meta["input_token_logprobs"]
    check_echo([token for _, token, _ in own], sequence)
    tops = meta["input_top_logprobs"] if top_k else [None] * len(own)
    if tops is None or len(tops) != len(own):
        raise ServerGarbled(f"{len(own)} tokens came back with {len(tops or [])} rows of top-{top_k}.")
    rows = []
    for place in range(max(first, 1), len(sequence)):
        value = own[place][0]
        if value is None:
            raise ServerGarbled(f"position {place} has no log-probability.")
        rows.append(_likeliest(place, value, sequence[place], tops[place] or [], top_k))
    return joined(rows)


def _likeliest(place: int, value: float, written: int, top: list[_Top], top_k: int) -> Row:
    top = sorted(top, key=lambda entry: -entry[0])
    _check_row(place, value, written, top, top_k)
    return min(value, 0.0), [(token, min(x, 0.0)) for x, token, _ in top]


def _check_row(place: int, value: float, written: int, top: list[_Top], top_k: int) -> None:
    found = {token: x for x, token, _ in top}
    if len(top) != top_k or len(found) != top_k:
        raise ServerGarbled(f"position {place}: the top-{top_k} was asked for, and {len(found)} came.")
    beside = math.exp(value) if written not in found else 0.0
    same = abs(found.get(written, value) - value) <= ROUNDING
    mass = math.fsum(map(math.exp, found.values())) + beside
    falls = all(a[0] >= b[0] for a, b in itertools.pairwise(top))
    if not same or not falls or mass > 1.0 + ROUNDING or (beside and top and value > top[-1][0] + ROUNDING):
        raise ServerGarbled(f"position {place}: the log-probabilities make no distribution.")
