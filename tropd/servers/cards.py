"""A server's list of its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from tropd.servers.answers import parsed
from tropd.servers.pool import Job


@dataclass(frozen=True, kw_only=True)
class Card:
    """One model."""

    id: str
    root: str | None = None
    max_model_len: Annotated[int, Field(ge=2)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Cards:
    data: Annotated[list[Card], Field(min_length=1)]


def cards_job(url: str) -> Job[list[Card]]:
    """Request the list of all models."""
    return Job(name=f"{url}/v1/models", path="/v1/models", read=lambda answer, id: read_cards(answer))


def read_cards(answer: bytes) -> list[Card]:
    return parsed(TypeAdapter(_Cards), answer).data
