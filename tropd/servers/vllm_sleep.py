"""Requests that put a vLLM server to sleep, which frees its GPU memory, and wake it.

    sleep     POST /sleep?level=2, which throws weights and KV cache away; level 1 keeps the weights in CPU memory
    wake      POST /wake_up?tags=weights, then the caller gives the weights, then POST /wake_up?tags=kv_cache
    state     GET /is_sleeping; GET /server_info says whether it was started with --enable-sleep-mode

Requests to a sleeping server wait until it is awake.  Without --enable-sleep-mode vLLM answers as if it slept and keeps
its memory.  Each function asks the one server of a pool.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pydantic import TypeAdapter

from tropd.errors import ServerGarbled, ServerRefused
from tropd.servers.answers import parsed
from tropd.servers.pool import Job, Pool

FLAG = "--enable-sleep-mode"


@dataclass(frozen=True, kw_only=True)
class _State:
    is_sleeping: bool


@dataclass(frozen=True, kw_only=True)
class _Model:
    enable_sleep_mode: bool


@dataclass(frozen=True, kw_only=True)
class _Device:
    device: str


@dataclass(frozen=True, kw_only=True)
class _Config:
    model_config: _Model
    device_config: _Device


@dataclass(frozen=True, kw_only=True)
class _Info:
    vllm_config: _Config


def is_sleeping(pool: Pool) -> bool:
    def read(answer: bytes, request_id: str) -> bool:
        return parsed(TypeAdapter(_State), answer).is_sleeping

    (state,) = pool.run([Job(name="/is_sleeping", path="/is_sleeping", read=read)])
    return state


def sleep(pool: Pool, level: int) -> None:
    _ask(pool, f"/sleep?level={level}")
    if not is_sleeping(pool):
        raise ServerRefused(f"{_url(pool)} was asked to sleep, and says that it does not.")


@contextmanager
def waking(pool: Pool, level: int) -> Iterator[None]:
    """Wake the server; the block gives it the weights.  After a sleep of level 2 there is memory for them, but not yet
    for the cache: loading weights needs more memory than holding them."""
    _ask(pool, "/wake_up?tags=weights" if level == 2 else "/wake_up")
    yield
    if level == 2:
        _ask(pool, "/wake_up?tags=kv_cache")
    if is_sleeping(pool):
        raise ServerRefused(f"{_url(pool)} was asked to wake up, and says that it still sleeps.")


def wake_if_asleep(pool: Pool) -> bool:
    """Wake the server; whether it slept.  After a sleep of level 2 it has no valid weights until it gets them."""
    try:
        slept = is_sleeping(pool)
    except ServerRefused:  # without these routes it cannot have been put to sleep
        return False
    if slept:
        with waking(pool, 2):
            pass
    return slept


def objection(pool: Pool) -> str:
    """A note for the user on a server's sleep.  A server that would keep its memory is refused."""
    (client,) = pool.clients
    try:
        found = parsed(TypeAdapter(_Info), client.ask("/server_info?config_format=json")).vllm_config
    except (ServerGarbled, ServerRefused):
        return (
            f"whether {client.url} was started with {FLAG} could not be read: without it a server says that it sleeps "
            "and keeps its memory."
        )
    if found.model_config.enable_sleep_mode:
        return ""
    if found.device_config.device == "cpu":
        return f"{client.url} computes on a CPU, where vLLM keeps its memory when it sleeps."
    raise ServerRefused(f"{client.url} was started without {FLAG}: it would say that it sleeps, and keep its memory.")


def _ask(pool: Pool, path: str) -> None:
    pool.run([Job(name=path, path=path, body={}, read=lambda answer, id: None)])


def _url(pool: Pool) -> str:
    return pool.clients[0].url
