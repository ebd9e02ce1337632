"""Peak memory of a step on the CPU beside what `tropd doctor` and `tropd plan` expect, each case in its own process.

    python benchmarks/memory.py

Growth of the resident set over two steps, above what models and masters hold before the first.  Large blocks are given
back to the system at once (MALLOC_MMAP_THRESHOLD_), so that the peak is of what is alive.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import step as models
import torch
import tyro
from rich.console import Console
from rich.table import Table

RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "OMP_NUM_THREADS": "1"}


@dataclass
class Case:
    vocabulary: int = 4_096
    prompts: int = 64
    new_tokens: int = 64
    dtype: str = "float32"
    checkpointing: bool = False
    lora: bool = False
    method: str = "tropd"
    alone: bool = False
    """Run it here and print bytes (used by the script itself)."""


CASES = (
    Case(vocabulary=151_936, prompts=8, new_tokens=128),
    Case(),
    Case(checkpointing=True),
    Case(lora=True),
    Case(dtype="bfloat16"),
    Case(vocabulary=65_536, prompts=8, new_tokens=128, dtype="bfloat16"),
    Case(vocabulary=32_768, prompts=8, new_tokens=128, method="gkd"),
)


def measure(case: Case, folder: Path) -> tuple[int, int]:
    """Bytes: measured, expected."""
    from tropd.config.run import Run
    from tropd.doctor.cost import need_of
    from tropd.doctor.subject import read_subject
    from tropd.monitoring.alarms import Alarms
    from tropd.run.start import assemble
    from tropd.training.iteration import iterate
    from tropd.training.source import Source

    settings = {"vocabulary": case.vocabulary, "dtype": case.dtype, "num_prompts": case.prompts}
    models.prepare(folder, models.Settings(**settings))  # type: ignore[arg-type]
    student = {"path": f"{folder}/student", "dtype": case.dtype, "gradient_checkpointing": case.checkpointing}
    run = Run.from_dict(
        {
            "device": "cpu",
            "student": student | ({"lora": {"rank": 16}} if case.lora else {}),
            "teacher": {"path": f"{folder}/teacher", "dtype": case.dtype},
            "data": {"path": f"{folder}/prompts.jsonl"},
            "method": {"name": case.method, **({"guidance": False} if case.method == "tropd" else {})},
            "rollout": {
                "num_prompts": case.prompts,
                "num_rollouts": 1,
                "max_new_tokens": case.new_tokens,
                "save_every": 0,
            },
            "output": f"{folder}/run",
        },
        "benchmarks/memory.py",
    )
    subject, _ = read_subject(run)
    assert subject is not None
    need = need_of(subject)
    parts, alarms = assemble(run, folder), Alarms(run.alarms)
    source = Source(parts)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for step in range(2):
        iterate(parts, source, folder, step, alarms)
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before, need.peak - need.weights - need.masters


def main(case: Case) -> None:
    torch.set_num_threads(1)
    if case.alone:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(case, Path(folder))))
        return
    table = Table("case", "measured, MB", "expected, MB", "measured / expected")
    for case in CASES:
        flags = [f"--{f.name.replace('_', '-')}={getattr(case, f.name)}" for f in fields(case) if f.type != "bool"]
        flags += [f"--{name}" for name in ("checkpointing", "lora") if getattr(case, name)]
        done = subprocess.run(
            [sys.executable, __file__, *flags, "--alone"],
            env={**os.environ, **RETURNED},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        measured, expected = json.loads(done.stdout.splitlines()[-1])
        table.add_row(
            " ".join(flags), f"{measured / 2**20:.0f}", f"{expected / 2**20:.0f}", f"{measured / expected:.2f}"
        )
        print(flags, measured, expected, flush=True)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(tyro.cli(Case))
