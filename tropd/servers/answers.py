"""Bytes of a server become what was asked for, or are refused."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from tropd.errors import ServerGarbled

Answer = TypeVar("Answer")


def parsed(adapter: TypeAdapter[Answer], answer: bytes) -> Answer:
    try:
        return adapter.validate_json(answer)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the answer"
        raise ServerGarbled(f"{len(answer)} bytes are not the answer asked for: {where}: {first['msg']}.") from None
