"""FSDP2 on one rank: the cut model computes what the whole one computes, and trains."""

from __future__ import annotations

import os
import random
import socket
from typing import Literal

import torch
import torch.distributed as dist

from benchmarks.gpu_check.sizes import Sizes, make_model
from benchmarks.gpu_check.table import Table
from tropd.config.stages import OptimizerConfig
from tropd.distributed.ranks import Ranks
from tropd.distributed.sharding import Shards
from tropd.model.forward import Forward
from tropd.model.optimizer import Optimizer
from tropd.types import Author, Prompt, Rollout


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # One process needs no network, and the machine may have none.
    os.environ |= {"NCCL_SOCKET_IFNAME": "lo", "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    backend = "cpu:gloo,cuda:nccl" if s.device == "cuda" else "gloo"
    dist.init_process_group(backend, rank=0, world_size=1)
    try:
        for dtype in ("float32", "bfloat16"):
            with table.guard(f"FSDP2 on one rank, {dtype}", fails=True):
                _compare(s, table, dtype)
    finally:
        dist.destroy_process_group()


def _compare(s: Sizes, table: Table, dtype: Literal["float32", "bfloat16"]) -> None:
    model = make_model(s.student, s, dtype).requires_grad_(True)
    numbers = random.Random(0)
    ids = tuple(numbers.randrange(s.vocabulary) for _ in range(48))
    authors = (Author.CONTEXT,) * 8 + (Author.STUDENT,) * 40
    rollout = Rollout(
        id="0", prompt=Prompt(id="0", token_ids=ids[:8]), token_ids=ids, authors=authors, behavior_logprobs=(0.0,) * 48
    )
    plain = Forward(model, vocab_size=s.vocabulary, layout="padded")
    whole_NH = plain.hidden([rollout])
    whole_NH.float().square().mean().backward()
    expected = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)

    shards = Shards(model, Ranks(0, 1))
    cut_NH = shards.forward(plain).hidden([rollout])
    cut_NH.float().square().mean().backward()
    far = _distance(cut_NH, whole_NH)
    gradients = {name: p.grad.full_tensor() for name, p in shards.cut.named_parameters() if p.grad is not None}
    worst = max(_distance(gradients[name], gradient) for name, gradient in expected.items())
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    table.check(
        f"FSDP2 on one rank, {dtype}: states and gradients of the whole",
        max(far, worst) < tolerance,
        f"{far:.1e}, {worst:.1e}",
        note=f"relative, below {tolerance:g}; torch {torch.__version__}",
    )

    Optimizer(shards.cut, OptimizerConfig(learning_rate=1e-3), 10).step()
    before = next(model.parameters()).detach().clone()
    shards.empty()
    shards.fill()
    moved = float((next(model.parameters()) - before).abs().max())
    table.check(f"FSDP2 on one rank, {dtype}: an update reaches the whole", 0 < moved < 0.1, f"{moved:.1e}")


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
