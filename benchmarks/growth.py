"""What the vocabulary head costs as each thing it depends on grows: time and peak memory, tables and one figure.

    python benchmarks/growth.py                      # every sweep, docs/figures/growth.svg (ten minutes, 2 GB)
    python benchmarks/growth.py --sweeps outliers masked --figure None

tokens       N = 256 .. 4096                    outliers   share of rows that teach the teacher's top-k
vocabulary   V, at N = 512                      head       student half alone: head trained, head frozen
top_k        k                                  masked     student half of a training step of a real model, N = 1024:
                                                           share of rows that no term weighs
float32, H = 256, tiles of 256 tokens, random weights; V = 151,936, k = 64 and N = 1024 unless said.  One thread, CPU
seconds, medians, the values of a sweep interleaved; peak resident memory of each in a process of its own.
"""

from __future__ import annotations

import json
import os
import random
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import tyro
from head import Problem, peak_megabytes, timed
from head import Settings as HeadSettings
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import qwen3
from tropd.methods import TrOPD
from tropd.model.tiling import Tiling
from tropd.objective.context import Context
from tropd.teachers.local import LocalTeacher
from tropd.training.learner import ModelLearner
from tropd.training.scoring import score
from tropd.training.step import train_step
from tropd.types import Author, Prompt, Rollout

Run = Callable[[], Any]
Row = dict[str, Any]
LABELS = {
    "tokens": "tokens N",
    "vocabulary": "vocabulary V (N = 512)",
    "top_k": "top-k of the teacher",
    "outliers": "share of outliers",
    "head": "head (student half)",
    "masked": "share of masked rows (student half)",
}


@dataclass
class Settings:
    sweeps: tuple[str, ...] = tuple(LABELS)
    repeats: int = 3
    figure: Path | None = Path(__file__).parents[1] / "docs" / "figures" / "growth.svg"


def cells(sweep: str) -> dict[Any, tuple[HeadSettings, str]]:
    """For each value of a sweep the problem and the side of `benchmarks/head.py` that is run."""
    if sweep == "tokens":
        return {n: (HeadSettings(tokens=n), "ours") for n in (256, 512, 1024, 2048, 4096)}
    if sweep == "vocabulary":
        return {v: (HeadSettings(tokens=512, vocabulary=v), "ours") for v in (65_536, 151_936, 262_144)}
    if sweep == "top_k":
        return {k: (HeadSettings(top_k=k), "ours") for k in (8, 64, 256)}
    if sweep == "outliers":
        return {f: (HeadSettings(outliers=f), "ours") for f in (0.0, 0.2, 0.5, 1.0)}
    return {name: (HeadSettings(), side) for name, side in (("trained", "student"), ("frozen", "frozen"))}


class Discard:
    """An optimiser that drops the gradient: what is timed is the gradient, not the update."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model

    def step(self) -> tuple[float, float]:
        self.model.zero_grad(set_to_none=True)
        return 0.0, 0.0


def small_body(vocabulary: int, seed: int) -> PreTrainedModel:
    """One layer under a whole vocabulary; frozen embeddings, whose gradient would be as large as the head's."""
    model = qwen3(vocabulary, width=256, inner=256, layers=1, heads=(4, 2), seed=seed)
    model.get_input_embeddings().weight.requires_grad_(False)
    return model


def masked_runs(shares: tuple[float, ...] = (0.0, 0.5), vocabulary: int = 151_936) -> dict[Any, Run]:
    """The gradient pass of `train_step` where a share of the response tokens is the environment's, scattered."""
    student, objective = small_body(vocabulary, 0), TrOPD(guidance=False).objective
    discard: Any = Discard(student)
    learner = ModelLearner(
        student, discard, vocab_size=vocabulary, tiling=Tiling(tile_tokens=256, tokens_per_batch=8192)
    )
    teacher = LocalTeacher(small_body(vocabulary, 1), tiling=Tiling(tile_tokens=256))

    def run(share: float) -> Run:
        batch = score(make_rollouts(share, vocabulary), objective, teacher, learner, seed=0, recall=False)
        return lambda: train_step(batch, objective, learner, Context(progress=0.0), tokens_per_micro_batch=8192)

    return {share: run(share) for share in shares}


def make_rollouts(share: float, vocabulary: int, number: int = 16, length: int = 64) -> list[Rollout]:
    draws = random.Random(0)
    rollouts = []
    for n in range(number):
        ids = tuple(draws.randrange(vocabulary) for _ in range(8 + length))
        masked = set(draws.sample(range(length), round(share * length)))
        authors = [Author.ENVIRONMENT if t in masked else Author.STUDENT for t in range(length)]
        rollouts.append(
            Rollout(
                id=f"r{n}",
                prompt=Prompt(id=f"p{n}", token_ids=ids[:8]),
                token_ids=ids,
                authors=(*[Author.CONTEXT] * 8, *authors),
                behavior_logprobs=(0.0,) * len(ids),
            )
        )
    return rollouts


def measure(sweep: str, repeats: int) -> dict[Any, Row]:
    grid = {} if sweep == "masked" else cells(sweep)
    runs = masked_runs() if sweep == "masked" else {x: Problem(s).side(side) for x, (s, side) in grid.items()}
    seconds: dict[Any, list[float]] = {x: [] for x in runs}
    for repeat in range(repeats + 1):  # the first warms up
        for x, run in runs.items():
            spent = timed(run, "cpu")
            if repeat:
                seconds[x].append(spent)
    del runs
    rows = {}
    for x, spent in seconds.items():
        megabytes = peak_megabytes(grid[x][1], grid[x][0]) if x in grid else None
        rows[x] = {"seconds": statistics.median(spent), "range": [min(spent), max(spent)], "megabytes": megabytes}
    return rows


def bytes_per_token(vocabulary: int) -> float:
    """How much the peak grows with each token beyond a few tiles."""
    few, many = (peak_megabytes("ours", HeadSettings(tokens=n, vocabulary=vocabulary)) for n in (512, 4096))
    return (many - few) * 2**20 / (4096 - 512)


def check(found: dict[str, dict[Any, Row]]) -> dict[str, tuple[float, float, float]]:
    """Each ratio that has a goal: (value, lowest, highest)."""

    def ratio(sweep: str, a: Any, b: Any) -> float:
        return found[sweep][a]["seconds"] / found[sweep][b]["seconds"]

    goals = {}
    if "tokens" in found:
        small, large = bytes_per_token(65_536), bytes_per_token(151_936)
        print(f"memory a token beyond 512: {small:.0f} bytes at V = 65,536, {large:.0f} at V = 151,936")
        goals["time at 4096 / 1024 tokens"] = ratio("tokens", 4096, 1024), 3.7, 4.3
        goals["[N, V] tensors that memory grows by"] = (large - small) / (4 * (151_936 - 65_536)), -0.02, 0.02
    if "outliers" in found:
        goals["time of all outliers / none"] = ratio("outliers", 1.0, 0.0), 0.0, 1.10
    if "head" in found:
        goals["time of a frozen head / trained"] = ratio("head", "frozen", "trained"), 0.0, 0.75
    if "masked" in found:
        goals["time of 50 % masked rows / none"] = ratio("masked", 0.5, 0.0), 0.0, 0.55
    return goals


def report(sweep: str, rows: dict[Any, Row]) -> None:
    first = next(iter(rows.values()))["seconds"]
    print(f"\n{LABELS[sweep]:36} {'seconds':>9}  {'range':16} {'to first':>8} {'peak MB':>8}")
    for x, row in rows.items():
        low, high = row["range"]
        name = f"{x:,}" if isinstance(x, int) else str(x)
        memory = "-" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
        spread = f"{low:.3f}..{high:.3f}"
        print(f"{name:>36} {row['seconds']:9.3f}  {spread:16} {row['seconds'] / first:8.2f} {memory:>8}", flush=True)


def draw(found: dict[str, dict[Any, Row]], path: Path) -> None:
    """One panel a sweep: seconds as bars, peak memory as dots on the axis to the right."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 8})
    blue, orange = "#0b4f86", "#b54708"
    figure, axes = pyplot.subplots(2, 3, figsize=(8.4, 4.4), layout="constrained")
    for axis, (sweep, rows) in zip(axes.flat, found.items(), strict=False):
        names = [f"{x:,}" if isinstance(x, int) else str(x) for x in rows]
        axis.bar(names, [row["seconds"] for row in rows.values()], width=0.55, color="#9cc3e6")
        axis.set_title(LABELS[sweep], fontsize=9)
        axis.set_ylim(bottom=0)
        axis.set_ylabel("CPU seconds", color=blue)
        memory = [row["megabytes"] for row in rows.values()]
        if None not in memory:
            right = axis.twinx()
            right.plot(names, memory, "o-", color=orange, markersize=4, linewidth=1)
            right.set_ylim(0, 1.25 * max(memory))
            right.set_ylabel("peak MB", color=orange)
            right.locator_params(axis="y", nbins=4)
            right.spines["top"].set_visible(False)
        axis.locator_params(axis="y", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    drawn = StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"(\.\d)\d+", r"\1", re.sub(r"\n\s*", "\n", drawn.getvalue())))  # a third smaller


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    print(f"1 thread, torch {torch.__version__}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    found = {}
    for sweep in s.sweeps:
        found[sweep] = measure(sweep, s.repeats)
        report(sweep, found[sweep])
    print()
    goals = check(found)
    for name, (value, low, high) in goals.items():
        bounds = f"<= {high:g}" if low <= 0 else f"{low:g} to {high:g}"
        print(f"{name}: {value:.3f}, goal {bounds}: {'reached' if low <= value <= high else 'MISSED'}")
    print(f"load {os.getloadavg()[0]:.1f}\n" + json.dumps({"sweeps": found, "goals": goals}))
    if s.figure and find_spec("matplotlib"):
        draw(found, s.figure)


if __name__ == "__main__":
    main(tyro.cli(Settings))
