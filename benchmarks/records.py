"""A long run's records: what a report and one step of it cost.

python benchmarks/records.py [--steps 100000]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tropd.monitoring.records import RecordWriter

PROBES = [f"{group}/p{part}" for group in ("ratio", "entropy", "trust", "length", "support") for part in range(8)]
FIND = """
import time
from pathlib import Path
from tropd.monitoring.records import find_step
begun = time.perf_counter()
assert find_step(Path({path!r}), {step}).step == {step}
print(time.perf_counter() - begun)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        write(run, steps)
        size = (run / "records.jsonl").stat().st_size
        print(f"{steps} records, {size / 1e6:.0f} MB")
        seconds, megabytes, _ = measured("-m", "tropd", "report", str(run))
        print(f"tropd report: {seconds:.1f} s, {megabytes:.0f} MB")
        for name, step in (("first", 0), ("last", steps - 1)):
            path = str(run / "records.jsonl")
            seconds, megabytes, said = measured("-c", FIND.format(path=path, step=step))
            print(f"the {name} record: {float(said):.3f} s, {seconds:.1f} s with imports, {megabytes:.0f} MB")


def write(run: Path, steps: int) -> None:
    with RecordWriter(run / "records.jsonl", {"method": "tropd"}):
        pass
    (run / "run.toml").write_text(f"steps = {steps}\n")
    with (run / "records.jsonl").open("a") as file:
        for step in range(steps):
            file.write(json.dumps(record(step)) + "\n")


def record(step: int) -> dict[str, object]:
    wave = 1.0 + 0.1 * (step % 97) / 97
    term = {"loss": 0.123456789 * wave, "tokens": 512.0, "weight": 400.25}
    return {
        "kind": "step",
        "step": step,
        "progress": step / 1e6,
        "policy_version": step,
        "loss": 0.987654321 * wave,
        "terms": {name: term for name in ("trusted", "outlier", "guidance")},
        "probes": {name: 0.123456789 * wave + i for i, name in enumerate(PROBES)},
        "gradient_norm": wave,
        "learning_rate": 1e-5,
        "tokens": {"student": 4096, "teacher": 512, "context": 900},
        "seconds": {name: 0.5 * wave for name in ("rollout", "score", "train", "sync", "record", "total")},
        "evaluation": {"avg@4": 0.5, "num_prompts": 64.0} if step % 50 == 0 else None,
        "alarms": [],
    }


def measured(*argv: str) -> tuple[float, float, str]:
    """Seconds, peak memory in MB, and what it said."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, said
    return time.perf_counter() - begun, usage.ru_maxrss / 1024, said


if __name__ == "__main__":
    main()
