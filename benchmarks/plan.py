"""What `tropd plan` predicts of a step on this machine, beside what the step takes.

    python benchmarks/plan.py

Random models (student 4 x 256, teacher 6 x 384, 8 prompts of 64 tokens, 128 new ones, nobody stops early, so that the
forecast knows the lengths), one thread, seconds of wall clock, medians over steps.  The machine's speed is measured
first, as `--cluster here` does.  Run it on a quiet machine: the prediction knows nothing of neighbours.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from rich.console import Console
from rich.table import Table
from step import Settings, prepare

PHASES = {"write": "rollout", "score": "score", "train": "train"}
"""The forecast's names, and those of the records."""


def compare(vocabulary: int, steps: int = 5) -> dict[str, dict[str, float]]:
    from tropd.config.run import Run
    from tropd.monitoring.alarms import Alarms
    from tropd.planning import make_forecast, measure_here
    from tropd.run.start import assemble
    from tropd.training.iteration import iterate
    from tropd.training.source import Source

    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), Settings(vocabulary=vocabulary))
        run = Run.from_dict(
            {
                "steps": steps,
                "device": "cpu",
                "student": {"path": f"{folder}/student"},
                "teacher": {"path": f"{folder}/teacher"},
                "data": {"path": f"{folder}/prompts.jsonl"},
                "method": {"name": "tropd", "guidance": False},
                "rollout": {"num_prompts": 8, "num_rollouts": 1, "max_new_tokens": 128},
                "output": f"{folder}/run",
            },
            "benchmark",
        )
        forecast = make_forecast(run, measure_here(seconds=2.0))
        parts, alarms, measured = assemble(run, Path(folder)), Alarms(run.alarms), []
        source = Source(parts)
        for step in range(steps):
            record = iterate(parts, source, Path(folder), step, alarms).record
            measured.append(record.seconds)
    found = {}
    for ours, theirs in PHASES.items():
        took = statistics.median(seconds[theirs] for seconds in measured[1:])
        found[ours] = {"predicted": forecast.seconds[ours], "measured": took, "ratio": took / forecast.seconds[ours]}
    total = {key: sum(phase[key] for phase in found.values()) for key in ("predicted", "measured")}
    return {**found, "step": {**total, "ratio": total["measured"] / total["predicted"]}}


def main() -> None:
    torch.set_num_threads(1)
    table = Table("V", "phase", "predicted, s", "measured, s", "measured / predicted")
    everything = {}
    for vocabulary in (2_048, 32_768, 151_936):
        everything[vocabulary] = compare(vocabulary)
        for phase, numbers in everything[vocabulary].items():
            row = (f"{numbers['predicted']:.3g}", f"{numbers['measured']:.3g}", f"{numbers['ratio']:.2f}")
            table.add_row(f"{vocabulary:,}", phase, *row)
    Console().print(table)
    print(json.dumps(everything))


if __name__ == "__main__":
    main()
