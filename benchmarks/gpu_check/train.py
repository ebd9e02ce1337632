"""Distillation itself: the pair that comes with the package, and a larger one on the long testbed.

Items are NAME/METHOD.  Rows are told while training goes on, so a run that is cut off has told how far it came.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.table import Table
from tropd.config.run import Run
from tropd.monitoring.display import Silent
from tropd.run import start
from tropd.testbeds import TESTBEDS, Testbed, embedded
from tropd.testbeds.pair import Pair, measure, save, write_prompts
from tropd.testbeds.task import Shape, Training
from tropd.testbeds.training import fine_tune, make_model, seed_of
from tropd.types import StepRecord

METHODS: dict[str, dict[str, Any]] = {
    "opd": {"name": "opd"},
    "tropd": {"name": "tropd", "top_k": 4, "beta": 1.0, "prefix": {"shape": "cosine", "start": 0.5, "end": 0.0}},
    "tropd-clip": {"name": "tropd", "top_k": 4, "guidance": False, "outlier": "clip"},
}
"""TrOPD as the demonstration runs it (outliers learn by forward KL), and its outliers clipped."""


class Telling(Silent):
    """A row for each evaluation."""

    def __init__(self, table: Table, name: str) -> None:
        self.table, self.name, self.begun = table, name, time.perf_counter()

    def note(self, text: str) -> None:
        if text.startswith("before training"):
            self.table.tell(f"{self.name} before training", note=text)

    def update(self, record: StepRecord) -> None:
        if record.evaluation:
            took = time.perf_counter() - self.begun
            score = next(value for name, value in record.evaluation.items() if name.startswith("avg@"))
            self.table.tell(
                f"{self.name} after step {record.step + 1}",
                f"{score:.3f}",
                note=f"{took:.0f} s",
                seconds=record.seconds,
                evaluation=record.evaluation,
                probes=record.probes,
            )


def run(s: Sizes, table: Table, items: tuple[str, ...], folder: Path) -> None:
    for item in items:
        bed, _, method = item.partition("/")
        if method == "pair":
            with table.guard("a pair for the long testbed"):
                make_long_pair(s, folder / "long", table)
            continue
        with table.guard(item, fails=True):
            _distil(item, method, s, _pair_of(bed, folder), table, folder / "runs" / bed / method)


def _distil(item: str, method: str, s: Sizes, pair: Pair, table: Table, directory: Path) -> None:
    bed = TESTBEDS[pair.testbed]
    steps = s.long_steps if pair.testbed == "long" else s.train_steps
    width = {"learning_rate": bed.learning_rate if pair.testbed != "long" else 2e-4}
    values = {
        "steps": steps,
        "output": str(directory),
        "device": s.device,
        "grader": pair.grader,
        "method": METHODS[method],
        "student": {"path": str(pair.student), "dtype": "bfloat16" if s.device == "cuda" else "float32"},
        "teacher": {"path": str(pair.teacher), "dtype": "bfloat16" if s.device == "cuda" else "float32"},
        "data": {"path": str(pair.prompts)},
        "rollout": {
            "num_prompts": bed.num_prompts if s.device == "cuda" else 2,
            "num_rollouts": 4 if s.device == "cuda" else 1,
            "max_new_tokens": pair.max_new_tokens if s.device == "cuda" else 16,
            "max_batch": 256,
            "save_every": 0,
        },
        "optimizer": width,
        "evaluation": {
            "data": {"path": str(pair.held_out)},
            "limit": 128 if s.device == "cuda" else 2,
            "num_samples": 2,
            "every": max(1, steps // 5),
            "max_new_tokens": pair.max_new_tokens if s.device == "cuda" else 8,
            "prompts_per_call": 128,
        },
        "checkpoint": {"every": steps, "keep": 1},
        "alarms": {"support_collapse": "off"},
    }
    begun = time.perf_counter()
    start.train(Run.from_dict(values, "gpu-check"), display=Telling(table, item))
    took = time.perf_counter() - begun
    table.check(f"{item}: {steps} steps", True, f"{took / steps:.2f} s a step", note=f"{took:.0f} s in all")


def _pair_of(bed: str, folder: Path) -> Pair:
    if bed == "nano":
        return embedded("nano-hard")
    place = folder / "long"
    if not (place / "student" / "config.json").exists():
        raise FileNotFoundError("the pair of the long testbed was not made")
    testbed = TESTBEDS["long"]
    return Pair(
        testbed="long",
        teacher=place / "teacher",
        student=place / "student",
        prompts=place / "prompts.jsonl",
        held_out=place / "held_out.jsonl",
        grader=testbed.task.grader,
        max_new_tokens=testbed.max_new_tokens,
        facts={},
    )


def make_long_pair(s: Sizes, folder: Path, table: Table) -> None:
    """A teacher and a student of 10 to 20 million parameters, trained as the testbed says, at rates for their width."""
    bed = TESTBEDS["long"]
    folder.mkdir(parents=True, exist_ok=True)
    write_prompts(bed, 0, folder)
    for whose, width, layers, lessons in (
        ("teacher", s.long_widths[0], s.long_layers[0], bed.teacher_training),
        ("student", s.long_widths[1], s.long_layers[1], bed.student_training),
    ):
        begun = time.perf_counter()
        shape = Shape(width=width, layers=layers, heads=max(1, width // 64), hidden=3 * width)
        model = make_model(bed.task, shape, 512, seed_of(0, whose)).to(s.device)
        for number, lesson in enumerate(lessons):
            fine_tune(model, bed.task, _scaled(lesson, s, bed, width), seed_of(0, whose, number))
        found = measure(bed, model, folder) if s.judged else {"accuracy": float("nan")}
        save(model, bed.task, folder / whose)
        parameters = sum(p.numel() for p in model.parameters())
        table.tell(
            f"long {whose}, {parameters / 1e6:.1f} million parameters",
            f"{found['accuracy']:.3f}",
            note=f"accuracy on held-out prompts; made in {time.perf_counter() - begun:.0f} s",
            **found,
        )


def _scaled(lesson: Training, s: Sizes, bed: Testbed, width: int) -> Training:
    """The learning rates are those of width 64: they fall with the width, as Adam's steps add up over it."""
    steps = max(1, int(s.long_effort * lesson.steps))
    return dataclasses.replace(lesson, steps=steps, learning_rate=lesson.learning_rate * min(1.0, 64 / width))
