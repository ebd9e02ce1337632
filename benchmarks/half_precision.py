"""Accuracy after training in half precision beside float32: the embedded pair, 40 steps, three seeds.

    python benchmarks/half_precision.py
    python benchmarks/half_precision.py --methods opd --dtypes float32 bfloat16 --seeds 5

Student and teacher have the same precision.  256 held-out sums, two answers each at temperature 1, as in `tropd demo`.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from tropd import train
from tropd.config.run import Run
from tropd.laboratory.trial import Silent
from tropd.monitoring.records import read_records
from tropd.testbeds import embedded

METHODS = {
    "tropd": {"name": "tropd", "top_k": 4, "beta": 1.0, "prefix": {"shape": "cosine", "start": 0.5}},
    "opd": {"name": "opd"},
}


@dataclass
class Settings:
    methods: tuple[str, ...] = ("tropd", "opd")
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    seeds: int = 3
    steps: int = 40


def accuracy(method: str, dtype: str, seed: int, steps: int) -> float:
    pair = embedded("nano-hard")
    with tempfile.TemporaryDirectory() as folder:
        run = {
            "student": {"path": pair.student, "dtype": dtype},
            "teacher": {"path": pair.teacher, "dtype": dtype},
            "method": METHODS[method],
            "data": {"path": pair.prompts},
            "rollout": {"num_prompts": 32, "num_rollouts": 1, "max_new_tokens": 28},
            "optimizer": {"learning_rate": 3e-4, "warmup_steps": 10},
            "evaluation": {
                "data": {"path": pair.held_out, "limit": 256},
                "max_new_tokens": 28,
                "num_samples": 2,
                "every": steps,
            },
            "grader": pair.grader,
            "seed": seed,
            "steps": steps,
            "output": f"{folder}/run",
        }
        train(Run.from_dict(run, f"{method} in {dtype}"), display=Silent())
        records = read_records(Path(folder) / "run" / "records.jsonl")
    return records.steps[-1].evaluation["avg@2"]


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    found = {
        method: {dtype: [accuracy(method, dtype, seed, s.steps) for seed in range(s.seeds)] for dtype in s.dtypes}
        for method in s.methods
    }
    print(f"{'method':8} {'precision':10} {'mean':>6}  each seed")
    for method, by_dtype in found.items():
        for dtype, values in by_dtype.items():
            print(f"{method:8} {dtype:10} {statistics.mean(values):6.3f}  {' '.join(f'{x:.3f}' for x in values)}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(tyro.cli(Settings))
