"""Parse and check the bytes of a server's answer.

Axes as in `tropd.types`: T requested positions, K the teacher's top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from tropd.errors import ServerGarbled

Answer = TypeVar("Answer")
ROUNDING = 1e-3
Logprob = Annotated[float, Field(le=ROUNDING, allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A server's scores of the requested positions of one sequence."""

    logprobs: list[float]
    topk_ids_TK: list[list[int]]
    """Likeliest first; rows are as wide as requested, or as the server's vocabulary."""
    topk_logprobs_TK: list[list[float]]


Row = tuple[float, list[tuple[int, float]]]
"""Log-probability of the written token; the likeliest tokens with theirs."""


def joined(rows: Sequence[Row]) -> Scored:
    return Scored(
        logprobs=[logprob for logprob, _ in rows],
        topk_ids_TK=[[token for token, _ in top] for _, top in rows],
        topk_logprobs_TK=[[logprob for _, logprob in top] for _, top in rows],
    )


def check_echo(echo: Sequence[int], asked: Sequence[int]) -> None:
    if list(echo) == list(asked):
        return
    at = next((n for n, (a, b) in enumerate(zip(echo, asked, strict=False)) if a != b), min(len(echo), len(asked)))
    raise ServerGarbled(
        f"{len(asked)} tokens were asked about, and {len(echo)} were scored; they differ from position {at} on."
    )


def parsed(adapter: TypeAdapter[Answer], answer: bytes) -> Answer:
    try:
        return adapter.validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise ServerGarbled(f"{len(answer)} bytes are not the answer asked for: {where}: {first['msg']}.") from None
