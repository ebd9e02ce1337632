"""What somebody would write; tests/surface/test_types.py has mypy and pyright read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tropd
from tropd import OPD, DataConfig, Method, Objective, Run, StudentConfig, TrOPD, resume, train


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """A method of one's own."""

    reward: str = "x"

    @property
    def objective(self) -> Objective:
        return OPD().objective


def grader(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    return [1.0 for _ in completions]


def main() -> Path:
    run = Run(
        student="folder",
        teacher="folder",
        data=DataConfig(path="prompts.jsonl", limit=3),
        method=TrOPD(top_k=16),
        rollout=tropd.RolloutConfig(num_prompts=4),
        steps=10,
    )
    other: Run = Run.load("run.toml", ["--steps", "3"])
    text: str = run.dump() + other.fingerprint()
    print(text, run.student.path, run.method.objective.terms, StudentConfig(path="x").lora)
    methods: dict[str, type[Method]] = tropd.METHODS
    folder = train(Run(student="s", teacher="t", data="p", method=methods["opd"]()))
    train(Run(student="s", teacher="t", data="p", method="opd"))
    return resume(folder)
