"""What somebody would write; tests/surface/test_types.py has mypy and pyright read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tropd
from tropd import OPD, Callback, DataConfig, Method, Objective, Run, StudentConfig, Teacher, Term, TrOPD, resume, train
from tropd.objective import Needs, NegativeLogLikelihood
from tropd.teachers.teacher import ScoreRequest
from tropd.types import StepRecord, TeacherScores


@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """A method of one's own."""

    knob: int = 3

    @property
    def objective(self) -> Objective:
        terms = OPD().objective.terms
        return Objective(*terms, Term("texts", terms[0].where, NegativeLogLikelihood()))


class Flat(Teacher):
    """A teacher of one's own."""

    capabilities = Needs.SAMPLED

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        return []


class Watch(Callback):
    def on_step(self, record: StepRecord) -> bool:
        return record.step > 3


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
    train(Run(student=Path("s"), teacher="t", data="p", method="opd"), callbacks=[Watch()], overwrite=True)
    rows = [{"prompt": "2+2=", "answer": "4"}]
    train(
        Run(steps=2), student=("model", "tokenizer"), teacher=Flat(), method=Mine(knob=4), grader=grader, prompts=rows
    )
    score: float | None = tropd.evaluate("folder", rows, grader=grader, settings=tropd.EvalConfig(num_samples=1)).mean
    print(score)
    return resume(folder, teacher=Flat(), prompts=rows)
