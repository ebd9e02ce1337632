"""Useful tokens per CPU second: `TransformersEngine` against `generate` of transformers, same model, same requests.

    python benchmarks/rollouts.py [--repeats 3]

A random 4-layer model of width 256 on one thread.  Both sides run in this process, turn about; time is CPU time of the
process and the table shows medians.  A useful token is one that a request keeps: `generate` goes on computing padding
for rows that have stopped.  The engine also returns two log-probabilities per token; `generate` is not asked for any.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import qwen3
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Request


@dataclass(frozen=True)
class Case:
    name: str
    vocab_size: int
    num_requests: int
    prompt_lengths: tuple[int, int]
    max_new_tokens: int
    stop_every: int | None
    """Every so-many-th token of the vocabulary stops: a random model then stops with probability 1/stop_every."""
    dtype: torch.dtype = torch.float32


CASES = (
    Case("V=151936, B=64, ragged, stops", 151_936, 64, (16, 64), 128, 48),
    Case("V=151936, B=16, even", 151_936, 16, (64, 64), 64, None),
    Case("V=151936, B=16, even, bfloat16", 151_936, 16, (64, 64), 64, None, torch.bfloat16),
    Case("V=2048, B=16, even", 2_048, 16, (64, 64), 96, None),
)


def make_model(vocab_size: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: Any = qwen3(vocab_size, width=256, inner=768, layers=4, heads=(4, 2))
    return model.to(dtype).eval()


def make_requests(case: Case, seed: int) -> list[Request]:
    numbers = random.Random(seed)
    stop_ids = tuple(range(0, case.vocab_size, case.stop_every)) if case.stop_every else ()
    return [
        Request(
            token_ids=tuple(numbers.randrange(case.vocab_size) for _ in range(numbers.randint(*case.prompt_lengths))),
            max_new_tokens=case.max_new_tokens,
            seed=numbers.getrandbits(60),
            stop_ids=stop_ids,
        )
        for _ in range(case.num_requests)
    ]


def write_with_engine(model: PreTrainedModel, requests: list[Request]) -> int:
    completions = TransformersEngine(model, max_batch=len(requests)).generate(requests)
    return sum(len(completion.token_ids) for completion in completions)


def write_with_generate(model: Any, requests: list[Request]) -> int:
    width = max(len(request.token_ids) for request in requests)
    num_pads = [width - len(request.token_ids) for request in requests]
    ids_BT = torch.tensor([[0] * pads + list(r.token_ids) for pads, r in zip(num_pads, requests, strict=True)])
    mask_BT = torch.tensor([[0] * pads + [1] * (width - pads) for pads in num_pads])
    written_BT = model.generate(
        ids_BT.to(model.device),
        attention_mask=mask_BT.to(model.device),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=requests[0].max_new_tokens,
        eos_token_id=list(requests[0].stop_ids) or None,
        pad_token_id=0,
    )[:, width:]
    stops = set(requests[0].stop_ids)
    return sum(num_until_stop(row, stops) for row in written_BT.tolist())


def num_until_stop(token_ids: list[int], stops: set[int]) -> int:
    return next((i + 1 for i, token_id in enumerate(token_ids) if token_id in stops), len(token_ids))


Side = Callable[[PreTrainedModel, list[Request]], int]
SIDES: dict[str, Side] = {"generate": write_with_generate, "engine": write_with_engine}


def measure(case: Case, repeats: int) -> dict[str, list[float]]:
    """Tokens per CPU second of each side, one number per repeat; the first, unmeasured turn warms both up."""
    model = make_model(case.vocab_size, case.dtype)
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    for turn in range(repeats + 1):
        requests = make_requests(case, seed=turn) if turn else make_requests(case, seed=0)[:2]
        for name, write in SIDES.items():
            started = time.process_time()
            num_tokens = write(model, requests)
            if turn:
                rates[name].append(num_tokens / (time.process_time() - started))
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    results = []
    print(f"{'useful tokens per CPU second':32} {'generate':>10} {'engine':>10} {'ratio':>7}")
    for case in CASES:
        rates = measure(case, repeats)
        median = {name: statistics.median(values) for name, values in rates.items()}
        ratio = median["engine"] / median["generate"]
        print(f"{case.name:32} {median['generate']:10.0f} {median['engine']:10.0f} {ratio:6.2f}x", flush=True)
        results.append({"case": case.name, "median": median, "ratio": ratio, "repeats": rates})
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(json.dumps({"versions": versions, "threads": 1, "results": results}))


if __name__ == "__main__":
    main()
