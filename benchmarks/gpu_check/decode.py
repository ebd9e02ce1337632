"""H9: a step of generation against the time that reading the weights and the cache takes, and against HF `generate`."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.gpu_check.sizes import Sizes, make_model, seconds
from benchmarks.gpu_check.table import Table
from benchmarks.rollouts import write_with_generate
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Request


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    model = make_model(s.decode, s)
    bandwidth = _bandwidth(s)
    table.tell("memory bandwidth, read and written", f"{bandwidth / 1e12:.2f} TB/s")
    least = _bytes_of_a_step(model, s) / bandwidth
    found: dict[str, float] = {}
    sides = {
        "recorded steps": lambda n: _engine(model, s, True, n),
        "plain steps": lambda n: _engine(model, s, False, n),
        "generate": lambda n: write_with_generate(model, _requests(s, n)),
    }
    for name, write in sides.items():
        with table.guard(f"H9 {name}"):
            for num_steps in s.decode_steps:  # warms up, and records
                write(num_steps)
            short, long = (min(_twice(partial(write, n), s)) for n in s.decode_steps)
            found[name] = max(long - short, 1e-9) / (s.decode_steps[1] - s.decode_steps[0])
            took = f"{1e3 * found[name]:.2f} ms"
            table.tell(f"a step of {s.decode_rows} rows, {name}", took, short=short, long=long)
    if "recorded steps" in found:
        share, context = least / found["recorded steps"], s.decode_prompt + sum(s.decode_steps) // 2
        table.bar(
            "H9 decoding: least time / ours",
            ">= 0.35",
            f"{share:.2f}",
            share >= 0.35 if s.judged else None,
            note=f"weights and a cache of about {context} tokens a row once, at the bandwidth measured here: "
            f"{1e3 * least:.2f} ms",
            least=least,
            **found,
        )
    if {"recorded steps", "generate"} <= found.keys():
        ratio = found["generate"] / found["recorded steps"]
        table.bar("H9 decoding: HF generate / ours", ">= 3", f"{ratio:.1f}", ratio >= 3 if s.judged else None, **found)


def _twice(run: Callable[[], Any], s: Sizes) -> list[float]:
    return [seconds(run, s) for _ in range(2)]


_ENGINES: dict[bool, TransformersEngine] = {}


def _engine(model: Any, s: Sizes, fixed: bool, num_steps: int) -> None:
    engine = _ENGINES.setdefault(fixed, TransformersEngine(model, max_batch=s.decode_rows, fixed=fixed))
    completions = engine.generate(_requests(s, num_steps))
    assert sum(len(c.token_ids) for c in completions) == s.decode_rows * num_steps


def _requests(s: Sizes, num_steps: int) -> list[Request]:
    numbers = random.Random(0)
    return [
        Request(
            token_ids=tuple(numbers.randrange(s.vocabulary) for _ in range(s.decode_prompt)),
            max_new_tokens=num_steps,
            seed=i,
        )
        for i in range(s.decode_rows)
    ]


def _bandwidth(s: Sizes) -> float:
    """Bytes a second of a copy, read and written."""
    source = torch.empty(2**30 if s.device == "cuda" else 2**22, dtype=torch.uint8, device=s.device)
    target = torch.empty_like(source)
    target.copy_(source)
    took = min(seconds(lambda: [target.copy_(source) for _ in range(10)], s) for _ in range(3)) / 10
    return 2 * source.numel() / took


def _bytes_of_a_step(model: Any, s: Sizes) -> float:
    size, shape = 2, s.decode
    weights = sum(p.numel() for p in model.parameters()) * size  # the tied embedding is read as the head
    context = s.decode_prompt + sum(s.decode_steps) / 2
    keys_and_values = (
        s.decode_rows * context * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * size
    )
    return weights + keys_and_values
