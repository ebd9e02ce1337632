"""Runs of several processes: what torchrun does, from a server that has imported the libraries already."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

from tests import run_case
from tests.run_case import Ended, Order, Running

PRELOAD = ["tropd.checkpoints.sharded_checkpoint", "pandas", "torch.distributed.rendezvous"]
if PRELOAD[0] not in run_case.PRELOAD:  # read when the first process starts
    run_case.PRELOAD.extend(PRELOAD)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def become(environment: Mapping[str, str], prepare: Callable[[], None] | None = None) -> None:
    os.environ.update(environment)
    if prepare is not None:
        prepare()


def start(
    size: int, *, train: Path | None = None, directory: Path, prepare: Mapping[int, Any] | None = None, **how: Any
) -> list[Running]:
    """One process per rank; `prepare` does something in some of them first.  What only one may do, rank 0 does."""
    port, ranks = free_port(), []
    for rank in range(size):
        names = {"WORLD_SIZE": size, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in names.items()}
        ready = partial(become, environment, (prepare or {}).get(rank))
        logs = directory.parent / f"rank_{rank}"
        ranks.append(run_case.start(Order(train=train, directory=directory, prepare=ready, logs=logs, **how)))
    return ranks


def run(size: int, **how: Any) -> list[Ended]:
    """All ranks to their end, each without an error."""
    ended = [rank.wait() for rank in start(size, **how)]
    assert [e.code for e in ended] == [0] * size, "\n".join(e.said + e.message for e in ended)
    return ended


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    whole, adapter = (directory / "model" / f"{name}.safetensors" for name in ("model", "adapter_model"))
    return load_file(whole if whole.exists() else adapter)


def distance(one: Path, other: Path) -> float:
    """The largest relative difference between the exported weights of two runs."""
    a, b = weights_of(one), weights_of(other)
    assert a.keys() == b.keys() and a
    return max(float((a[name] - b[name]).norm() / a[name].norm()) for name in a)


def rollouts_of(directory: Path) -> dict[str, dict[str, Any]]:
    """Every rollout of every step, by its name."""
    found = {}
    for path in sorted((directory / "rollouts").glob("*.parquet")):
        rows = pq.read_table(path).to_pylist()
        found |= {row["id"]: row for row in rows}
    return found
