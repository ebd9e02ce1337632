"""Other weights for a running vLLM server: what it is asked, and what counts as done.

    a folder of weights     POST /collective_rpc reload_weights, then POST /reset_prefix_cache   VLLM_SERVER_DEV_MODE=1
    an adapter's folder     POST /v1/load_lora_adapter under a new name, and the old one away    --enable-lora and
                                                                          VLLM_ALLOW_RUNTIME_LORA_UPDATING=1

The server reads the folder itself, so it has to see the same file system.  That it answers says little about what it
computes with afterwards: `tropd.rollout.canary` asks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from tropd.errors import ServerUnavailable
from tropd.servers.answers import parsed
from tropd.servers.pool import Job

DEV_MODE = "VLLM_SERVER_DEV_MODE=1"
LORA_MODE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that a server lists."""

    id: str
    max_model_len: Annotated[int, Field(ge=2)] | None = None


@dataclass(frozen=True, kw_only=True)
class _Listed:
    data: Annotated[list[Served], Field(min_length=1)]


@dataclass(frozen=True, kw_only=True)
class _Reset:
    success: bool = True
    """Older servers answer with nothing."""


def reload_weights(folder: Path) -> Job[None]:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder.resolve())}}
    return _job("/collective_rpc", body)


def reset_prefix_cache() -> Job[None]:
    """What was computed with the old weights must not be continued with the new ones."""

    def read(answer: bytes, request_id: str) -> None:
        if answer.strip() and not parsed(TypeAdapter(_Reset), answer).success:
            raise ServerUnavailable("the prefix cache is still in use. Does somebody else ask this server?")

    return Job(
        name="/reset_prefix_cache", path="/reset_prefix_cache", body={}, read=read, num_tokens=1, limit_bytes=2**20
    )


def load_adapter(name: str, folder: Path) -> Job[None]:
    return _job("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder.resolve())})


def unload_adapter(name: str) -> Job[None]:
    return _job("/v1/unload_lora_adapter", {"lora_name": name})


def read_models(answer: bytes) -> list[Served]:
    """What GET /v1/models lists."""
    return parsed(TypeAdapter(_Listed), answer).data


def _job(path: str, body: dict[str, object]) -> Job[None]:
    return Job(name=path, path=path, body=body, read=lambda answer, id: None, num_tokens=1, limit_bytes=2**20)
