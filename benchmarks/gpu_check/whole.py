"""H10 to H12: a step from prompts to new weights against TRL (`benchmarks/step.py` at other sizes)."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import step
from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.table import Table
from tropd.types import StepRecord

PHASES = ("rollout", "score", "train")
NUM_STEPS = 3
"""The first warms up."""


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    settings = step.Settings(
        vocabulary=s.vocabulary,
        dtype="bfloat16",
        ragged=True,
        device="cuda" if s.device == "cuda" else "cpu",
        stop_every=s.stop_every,
        num_prompts=s.num_prompts,
        prompt_tokens=s.prompt_tokens,
        new_tokens=s.new_tokens,
        student=s.student,
        teacher=s.teacher,
    )
    with TemporaryDirectory() as name:
        folder = Path(name)
        step.prepare(folder, settings)
        rates: dict[str, float] = {}
        with table.guard("H10 a whole step", ">= 2.5"):
            rates["ours"] = _ours(folder, settings, s, table)
        with table.guard("H10 a whole step: ours / TRL, useful tokens a second", ">= 2.5"):
            rates["trl"] = _trl(folder, settings, table)
            ratio = rates["ours"] / rates["trl"]
            table.bar(
                "H10 a whole step: ours / TRL, useful tokens a second",
                ">= 2.5",
                f"{ratio:.2f}",
                ratio >= 2.5 if s.judged else None,
                note=f"{s.num_prompts} prompts, up to {s.new_tokens} new tokens, one in {s.stop_every} stops; "
                "TRL trains bfloat16 weights, ours float32 masters",
                **rates,
            )


def _ours(folder: Path, settings: step.Settings, s: Sizes, table: Table) -> float:
    records: list[StepRecord] = []
    advance = step.tropd_side("tropd_tropd", folder, settings, records.append)
    pairs: list[tuple[int, float]] = []
    for _ in range(NUM_STEPS):
        start = step.now(settings)
        num_tokens = advance()
        pairs.append((num_tokens, step.now(settings) - start))
    (num_tokens, took), last = pairs[-1], records[-1]
    phases = {name: sum(r.seconds.get(name, 0.0) for r in records[1:]) for name in PHASES}
    total = sum(seconds for _, seconds in pairs[1:])
    table.tell(
        "tropd, a step",
        f"{took:.2f} s",
        note=", ".join(f"{n} {x / (len(pairs) - 1):.2f}" for n, x in phases.items()),
        pairs=pairs,
        seconds=last.seconds,
    )
    rest = max(0.0, 1 - sum(phases.values()) / total)
    table.bar(
        "H11 share of a step outside of rollout, score and train",
        "<= 5 %",
        f"{100 * rest:.1f} %",
        rest <= 0.05 if s.judged else None,
    )
    _gap(s, table, folder / "tropd_tropd" / "rollouts")
    return sum(n for n, _ in pairs[1:]) / total


def _gap(s: Sizes, table: Table, folder: Path) -> None:
    """How far the sampler's log-probabilities are from the trainer's, token by token."""
    with table.guard("H12 gap between sampler and trainer", "<= 0.06 nats"):
        deviation, worst, num_tokens = gap_of(folder)
        table.bar(
            "H12 gap between sampler and trainer, bfloat16",
            "sd <= 0.06 nats",
            f"{deviation:.4f} nats",
            deviation <= 0.06 if s.judged else None,
            note=f"largest {worst:.3f}, {num_tokens} tokens, random model",
        )


def gap_of(folder: Path) -> tuple[float, float, int]:
    """Standard deviation and largest size of log behavior - log student in kept rollouts, and their number."""
    import pyarrow.parquet as pq

    gaps: list[float] = []
    for path in sorted(folder.glob("*.parquet")):
        columns: Any = pq.read_table(path, columns=["behavior_logprobs", "student_logprobs"]).to_pydict()
        for behavior, student in zip(*columns.values(), strict=True):
            gaps += [a - b for a, b in zip(behavior, student, strict=True) if a is not None and b is not None]
    return statistics.pstdev(gaps), max(map(abs, gaps)), len(gaps)


def _trl(folder: Path, settings: step.Settings, table: Table) -> float:
    pairs: list[tuple[int, float]] = []
    started = [0.0]

    def begin() -> None:
        started[0] = step.now(settings)

    def end(num_tokens: int) -> None:
        pairs.append((num_tokens, step.now(settings) - started[0]))

    begun = time.perf_counter()
    step.run_trl(folder, settings, NUM_STEPS - 1, begin, end)
    table.tell("TRL, a step", f"{pairs[-1][1]:.2f} s", pairs=pairs, seconds=time.perf_counter() - begun)
    return sum(n for n, _ in pairs[1:]) / sum(t for _, t in pairs[1:])
