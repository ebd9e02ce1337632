"""Requests that give a running vLLM server new weights.

    a folder of weights     POST /collective_rpc reload_weights, then POST /reset_prefix_cache   VLLM_SERVER_DEV_MODE=1
    an adapter's folder     POST /v1/load_lora_adapter under a new name, and the old one away    --enable-lora and
                                                                          VLLM_ALLOW_RUNTIME_LORA_UPDATING=1

The server reads the folder itself, so it needs the same file system.  An answer does not prove that it uses the new
weights: `tropd.rollout.canary` checks that.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from tropd.errors import ServerRefused, ServerUnavailable
from tropd.servers import vllm_sleep
from tropd.servers.answers import parsed
from tropd.servers.pool import Job, Pool

DEV_MODE = "VLLM_SERVER_DEV_MODE"
LORA_MODE = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True, kw_only=True)
class _Reset:
    success: bool = True
    """Older servers answer with an empty body."""


class VllmWeights:
    """As `tropd.servers.dialect.Weights`."""

    sleep_advice = f"start vLLM with {vllm_sleep.FLAG} and {DEV_MODE}=1 in its environment"

    def give(self, pool: Pool, folder: Path) -> None:
        _ask(pool, "/collective_rpc", method="reload_weights", kwargs={"weights_path": str(folder.resolve())})

    def forget(self, pool: Pool) -> None:
        def read(answer: bytes, request_id: str) -> None:
            if answer.strip() and not parsed(TypeAdapter(_Reset), answer).success:
                raise ServerUnavailable("the prefix cache is still in use. Does somebody else ask this server?")

        pool.run([Job(name="/reset_prefix_cache", path="/reset_prefix_cache", body={}, read=read)])

    def give_adapter(self, pool: Pool, name: str, folder: Path) -> None:
        wanted = {"lora_name": name, "lora_path": str(folder.resolve())}
        try:
            _ask(pool, "/v1/load_lora_adapter", **wanted)
        except ServerRefused as error:
            if "already been loaded" not in str(error):
                raise
            # Of an earlier attempt, or of another run: its content is unknown.
            self.drop_adapter(pool, name)
            _ask(pool, "/v1/load_lora_adapter", **wanted)

    def drop_adapter(self, pool: Pool, name: str) -> None:
        _ask(pool, "/v1/unload_lora_adapter", lora_name=name)

    def advice(self, adapter: bool) -> str:
        mode = f"--enable-lora and {LORA_MODE}=1" if adapter else f"{DEV_MODE}=1"
        return f"Start vLLM with {mode} in its environment, so that it takes weights."

    def serving(self, rank: int | None) -> tuple[list[str], dict[str, str]]:
        if rank is None:
            return [], {DEV_MODE: "1"}
        return ["--enable-lora", "--max-loras", "2", "--max-lora-rank", str(rank)], {LORA_MODE: "1"}

    def sleep(self, pool: Pool, adapter: bool) -> None:
        vllm_sleep.sleep(pool, _level(adapter))

    def waking(self, pool: Pool, adapter: bool) -> AbstractContextManager[None]:
        return vllm_sleep.waking(pool, _level(adapter))

    def wake_if_asleep(self, pool: Pool) -> bool:
        return vllm_sleep.wake_if_asleep(pool)

    def objection(self, pool: Pool) -> str:
        return vllm_sleep.objection(pool)


def _level(adapter: bool) -> int:
    """The level of sleep, in vLLM's numbering."""
    return 1 if adapter else 2


def _ask(pool: Pool, path: str, **body: object) -> None:
    pool.run([Job(name=path, path=path, body=body, read=lambda answer, id: None)])
