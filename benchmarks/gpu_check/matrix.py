"""Every method in every precision, end to end on the pair that comes with the package.

Train, stop, resume, evaluate, export, and read the export again; then the student as its own teacher, which must give
no signal.
"""

from __future__ import annotations

import math
import os
import signal
import time
import traceback
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.table import Table
from tropd.config.run import Run
from tropd.errors import Interrupted
from tropd.methods import METHODS
from tropd.monitoring.display import Silent
from tropd.monitoring.records import read_records
from tropd.run import start
from tropd.testbeds import embedded
from tropd.types import StepRecord

PRECISIONS = ("float32", "bfloat16", "float16")
_OTHERWISE_TAUGHT = ("seqkd",)
"""Methods whose signal is not the difference between the two models."""


class Stopping(Silent):
    """Interrupts the run, as Ctrl-C would, once a step is recorded."""

    def update(self, record: StepRecord) -> None:
        if record.step == 0:
            os.kill(os.getpid(), signal.SIGINT)


def values_of(method: str, precision: str, s: Sizes, output: Path, **changes: Any) -> dict[str, Any]:
    """A short run on the embedded pair."""
    pair = embedded("nano-hard")
    return {
        "steps": s.matrix_steps,
        "output": str(output),
        "device": s.device,
        "grader": pair.grader,
        "method": {"name": method},
        "student": {"path": str(pair.student), "dtype": precision},
        "teacher": {"path": str(pair.teacher), "dtype": precision},
        "data": {"path": str(pair.prompts), "limit": 8},
        "rollout": {"num_prompts": 4, "num_rollouts": 2, "max_new_tokens": pair.max_new_tokens, "save_every": 1},
        "optimizer": {"learning_rate": 1e-4},
        "evaluation": {
            "data": {"path": str(pair.held_out)},
            "limit": 4,
            "num_samples": 1,
            "every": s.matrix_steps,
            "max_new_tokens": pair.max_new_tokens,
        },
        "checkpoint": {"every": 1, "keep": 1},
        "alarms": {"support_collapse": "off"},
        **changes,
    }


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    methods = s.matrix_methods or tuple(METHODS)
    for precision in items:
        begun = time.perf_counter()
        failures: dict[str, str] = {}
        for number, method in enumerate(methods, 1):
            try:
                with TemporaryDirectory() as name:
                    _end_to_end(method, precision, s, Path(name) / "run")
            except Exception as error:  # the next method may do better
                traceback.print_exc()
                failures[method] = f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:160]}"
            table.check(
                f"train, resume, evaluate, export in {precision}",
                not failures,
                f"{number - len(failures)} of {number} methods, of {len(methods)}",
                note="; ".join(f"{name}: {text}" for name, text in failures.items())[:900],
                failures=failures,
                seconds=time.perf_counter() - begun,
            )
        _own_teacher(methods, precision, s, table)


def _own_teacher(methods: tuple[str, ...], precision: str, s: Sizes, table: Table) -> None:
    what, signals = f"the student as its own teacher, {precision}", dict[str, float]()
    with table.guard(what, fails=True):
        for method in methods:
            if method in _OTHERWISE_TAUGHT:
                continue
            signals[method] = _signal(method, precision, s)
            worst = max(signals, key=lambda name: signals[name])
            value = f"mean |log p_T - log p_S| at most {signals[worst]:.1e}"
            table.check(what, signals[worst] < 1e-4, value, note=f"{worst}, of {len(signals)} methods", **signals)


def _end_to_end(method: str, precision: str, s: Sizes, directory: Path) -> None:
    run = Run.from_dict(values_of(method, precision, s, directory), "gpu-check")
    with suppress(Interrupted):
        start.train(run, display=Stopping())
    start.resume(directory, display=Silent())
    records = read_records(directory / "records.jsonl").steps
    assert [record.step for record in records] == list(range(s.matrix_steps)), "steps are missing after a resume"
    for record in records:
        assert math.isfinite(record.loss) and math.isfinite(record.gradient_norm), f"step {record.step} is not finite"
    assert records[-1].evaluation, "nothing was evaluated"
    assert max(_logprobs(directory), default=0.0) <= 0.0, "a log-probability is above 0"
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(directory / "model")


def _logprobs(directory: Path) -> list[float]:
    import pyarrow.parquet as pq

    found: list[float] = []
    for path in (directory / "rollouts").glob("*.parquet"):
        rows: dict[str, Any] = pq.read_table(path).to_pydict()
        for name in ("behavior_logprobs", "student_logprobs", "teacher_logprobs"):
            found += [x for row in rows.get(name, ()) for x in row if x is not None]
    return found


def _signal(method: str, precision: str, s: Sizes) -> float:
    """Mean distance of the two log-probabilities of written tokens in one step."""
    import pyarrow.parquet as pq

    pair = embedded("nano-hard")
    with TemporaryDirectory() as name:
        directory = Path(name) / "run"
        changes = {"steps": 1, "teacher": {"path": str(pair.student), "dtype": precision}}
        values = values_of(method, precision, s, directory, **changes)
        values["evaluation"] = {"every": 10}
        start.train(Run.from_dict(values, "gpu-check"), display=Silent())
        rows: dict[str, Any] = pq.read_table(next((directory / "rollouts").glob("*.parquet"))).to_pydict()
    pairs = [
        abs(a - b)
        for student, teacher in zip(rows["student_logprobs"], rows.get("teacher_logprobs", []), strict=True)
        for a, b in zip(student, teacher, strict=True)
        if a is not None and b is not None
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0
