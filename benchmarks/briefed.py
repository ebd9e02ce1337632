"""What a self-teacher that is told a solution costs: time beside another teacher of its size, memory beside none.

    python benchmarks/briefed.py

time     the student before training, told a column, against another model of the student's size, told nothing: whole
         steps, CPU seconds, turn about in one process
memory   an adapted student (LoRA): peak of two steps, models included, each case in a process of its own; "base" is a
         run that holds no teacher
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import step as models
import torch
import tyro
from memory import RETURNED

COLUMN = {"kind": "column", "column": "solution", "template": "{value} {prompt}"}
TOLD = {"path": "start", "briefing": COLUMN}
TEACHERS: dict[str, dict[str, Any]] = {
    "base": {"path": "base"},
    "start, told": TOLD,
    "start, told, ema": {**TOLD, "follow": {"rule": "ema", "decay": 0.9}},
    "start, told, copy": {**TOLD, "follow": {"rule": "copy"}},
    "another model": {},
}


@dataclass
class Settings:
    vocabulary: int = 32_768
    num_prompts: int = 8
    prompt_tokens: int = 64
    told_tokens: int = 64
    """Of the solution."""
    new_tokens: int = 128
    repeats: int = 5
    memory: bool = True
    """Measure peak memory too."""
    only: str = ""
    """Run two steps with this teacher and print the peak in megabytes (used by the script itself)."""


def prepare(folder: Path, s: Settings) -> None:
    """A student, another model of its size, and prompts with solutions."""
    shape = models.Shape()
    models.prepare(folder, models.Settings(vocabulary=s.vocabulary, teacher=shape, num_prompts=s.num_prompts))
    shape_ids = (s.num_prompts, s.prompt_tokens + s.told_tokens)
    ids = torch.randint(2, s.vocabulary, shape_ids, generator=torch.Generator().manual_seed(0))
    words = [[f"t{i}" for i in row] for row in ids.tolist()]
    rows = [{"prompt": " ".join(x[: s.prompt_tokens]), "solution": " ".join(x[s.prompt_tokens :])} for x in words]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)))


def stepper(folder: Path, s: Settings, teacher: dict[str, Any], name: str, lora: bool) -> Callable[[], None]:
    """Assembles a run and gives what makes its next step."""
    from tropd.config.run import Run
    from tropd.monitoring.alarms import Alarms
    from tropd.run.start import assemble
    from tropd.training.iteration import iterate
    from tropd.training.source import Source

    run = Run.from_dict(
        {
            "steps": 1_000_000,
            "device": "cpu",
            "student": {"path": str(folder / "student")} | ({"lora": {"rank": 16}} if lora else {}),
            "teacher": {"path": str(folder / "teacher"), **teacher},
            "data": {"path": str(folder / "prompts.jsonl")},
            "method": {"name": "opd"},
            "rollout": {
                "num_prompts": s.num_prompts,
                "num_rollouts": 1,
                "max_new_tokens": s.new_tokens,
                "save_every": 1_000_000,  # the first step's, which warms up
            },
            "optimizer": {"learning_rate": models.LEARNING_RATE},
        },
        "benchmarks/briefed.py",
    )
    directory = folder / f"{name.replace(', ', '-').replace(' ', '-')}{'-lora' * lora}"
    directory.mkdir()
    parts, alarms, steps = assemble(run, directory), Alarms(run.alarms), iter(range(run.steps))
    source = Source(parts)

    def step() -> None:
        iterate(parts, source, directory, next(steps), alarms)

    return step


def seconds(folder: Path, s: Settings) -> dict[str, list[float]]:
    """CPU seconds of each side's steps; the first, unmeasured one warms up."""
    sides = {name: stepper(folder, s, TEACHERS[name], name, lora=False) for name in ("start, told", "another model")}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(s.repeats + 1):
        for name in sorted(sides, reverse=turn % 2 == 1):
            started = time.process_time()
            sides[name]()
            taken[name].append(time.process_time() - started)
    return {name: each[1:] for name, each in taken.items()}


def peak(folder: Path, s: Settings) -> float:
    """Megabytes above what the imports hold."""
    import tropd.run.start  # noqa: F401

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    step = stepper(folder, s, TEACHERS[s.only], s.only, lora=True)
    for _ in range(2):
        step()
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return (int(line.split()[1]) * 1024 - before) / 2**20


def in_own_process(folder: Path, s: Settings, name: str) -> float:
    sizes = ("vocabulary", "num_prompts", "prompt_tokens", "told_tokens", "new_tokens")
    flags = [f"--{size.replace('_', '-')}={getattr(s, size)}" for size in sizes]
    done = subprocess.run(
        [sys.executable, __file__, *flags, "--only", name],
        env={**os.environ, **RETURNED, "BRIEFED_MODELS": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.splitlines()[-1])


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    if s.only:
        print(peak(Path(os.environ["BRIEFED_MODELS"]), s))
        return
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        prepare(folder, s)
        taken = seconds(folder, s)
        told, other = taken["start, told"], taken["another model"]
        ratios = [a / b for a, b in zip(told, other, strict=True)]
        print(f"V={s.vocabulary}, {s.prompt_tokens} + {s.new_tokens} tokens, {s.told_tokens} more for the teacher")
        print(
            f"a step: told itself {statistics.fmean(told):.2f} s, another model {statistics.fmean(other):.2f} s of CPU"
        )
        print(f"ratio {sum(told) / sum(other):.3f} ({min(ratios):.3f}..{max(ratios):.3f})", flush=True)
        found: dict[str, float] = {}
        for name in TEACHERS if s.memory else ():
            found[name] = in_own_process(folder, s, name)
            print(f"LoRA, {name:20} {found[name]:7.0f} MB  {found[name] / found['base']:.3f} of base", flush=True)
    print(json.dumps({"settings": vars(s), "seconds": taken, "megabytes": found}))


if __name__ == "__main__":
    main(tyro.cli(Settings))
