"""What writing ahead gains: the step of a real run with rollout.staleness 0 and 1.

    python benchmarks/ahead.py [--new-tokens 192]

A real vLLM server (`make vllm`) on one core writes, this process scores and trains on another, one thread each.  Whole
runs of `tropd.run.start.train` turn about on the same server; a step is the wall clock between two records, without the
first two of a run and the last, after which nothing is written ahead.  Random models (student 4 x 256, teacher 6 x 384,
8 prompts of 64 tokens, nobody stops early).  Steps in which others took more than a tenth of the two cores are left
out.  Beside it: what the phases of the synchronous steps promise, put together as `tropd plan` does, and what
`tropd plan` says without having seen any, as if the server were like this process.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from step import Settings as Models
from step import prepare

from tests.real_vllm.vllm import PYTHON, serve
from tropd.monitoring.display import Silent

OTHERS = 0.1
"""Share of the two cores."""
TICK = os.sysconf("SC_CLK_TCK")


@dataclass
class Settings:
    vocabulary: int = 8_192
    num_rollouts: int = 1
    """Per prompt."""
    new_tokens: int = 96
    steps: int = 8
    repeats: int = 5
    """Runs of each side."""
    minutes: float = 10.0
    """No pair of runs begins later."""
    patience: float = 60.0
    """Seconds that each run waits at most for others to leave the two cores."""
    cores: tuple[int, int] = (0, 1)
    """Of this process, and of the server."""


@dataclass(frozen=True)
class Moment:
    """A record was made."""

    at: float
    taken: float
    """CPU seconds that others had of the two cores so far, but those that are nice and yield."""
    phases: dict[str, float]


@dataclass(frozen=True)
class Step:
    seconds: float
    others: float
    """Share of the two cores."""
    phases: dict[str, float]


class Clock(Silent):
    """Knows when each step was recorded."""

    def __init__(self, cores: tuple[int, int], server: int) -> None:
        self.cores, self.server, self.moments = cores, server, list[Moment]()

    def update(self, record: Any) -> None:
        taken = busy_seconds(self.cores) - own_seconds(self.server)
        self.moments.append(Moment(time.perf_counter(), taken, record.seconds))

    def steps(self) -> list[Step]:
        """Those that have a batch before and after them."""
        pairs = list(zip(self.moments, self.moments[1:], strict=False))[1:-1]
        return [Step(b.at - a.at, (b.taken - a.taken) / (b.at - a.at) / 2, b.phases) for a, b in pairs]


def busy_seconds(cores: tuple[int, int]) -> float:
    lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    fields = [line for line in lines if line[0] in {f"cpu{core}" for core in cores}]
    return sum(int(line[column]) for line in fields for column in (1, 3, 6, 7)) / TICK  # user, system, interrupts


def own_seconds(server: int) -> float:
    """CPU time of this process and of the server's process group."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        if int(fields[2]) == server or path.parent.name == str(os.getpid()):
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def wait_until_quiet(s: Settings, server: int) -> None:
    deadline = time.monotonic() + s.patience
    while time.monotonic() < deadline:
        before = busy_seconds(s.cores) - own_seconds(server)
        time.sleep(2.0)
        if busy_seconds(s.cores) - own_seconds(server) - before < OTHERS * 2 * 2.0:
            return


def pin(core: int) -> None:
    """All threads of this process; those that it starts, and processes, inherit it."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), {core})


def run_of(folder: Path, url: str, name: str, staleness: int, s: Settings) -> Any:
    from tropd.config.run import Run

    return Run.from_dict(
        {
            "steps": s.steps,
            "device": "cpu",
            "student": {"path": f"{folder}/student"},
            "teacher": {"path": f"{folder}/teacher"},
            "data": {"path": f"{folder}/prompts.jsonl"},
            "method": {"name": "tropd", "guidance": False},
            "rollout": {
                "num_prompts": 8,
                "num_rollouts": s.num_rollouts,
                "max_new_tokens": s.new_tokens,
                "save_every": 0,
                "servers": [url],
                "staleness": staleness,
            },
            "optimizer": {"learning_rate": 1e-6},
            "checkpoint": {"every": s.steps},
            "output": f"{folder}/{name}",
        },
        "benchmarks/ahead.py",
    )


def measure(folder: Path, url: str, server: int, s: Settings) -> dict[int, list[Step]]:
    """By staleness."""
    from tropd.run.start import train

    found: dict[int, list[Step]] = {0: [], 1: []}
    started = time.monotonic()
    for repeat in range(s.repeats):
        if time.monotonic() - started > s.minutes * 60:
            break
        for staleness in (0, 1) if repeat % 2 == 0 else (1, 0):
            wait_until_quiet(s, server)
            clock = Clock(s.cores, server)
            train(run_of(folder, url, f"run-{repeat}-{staleness}", staleness, s), display=clock)
            steps = clock.steps()
            found[staleness] += steps
            said = " ".join(f"{step.seconds:.2f} ({step.others:.0%})" for step in steps)
            print(f"staleness {staleness}: {said}; load {os.getloadavg()[0]:.1f}", flush=True)
    return found


def medians(steps: list[Step]) -> dict[str, float]:
    phases = {name: statistics.median(step.phases[name] for step in steps) for name in steps[0].phases}
    return {**phases, "step": statistics.median(step.seconds for step in steps)}


def show(steps: dict[int, list[Step]], forecasts: dict[int, Any]) -> None:
    quiet = {k: [step for step in found if step.others <= OTHERS] for k, found in steps.items()}
    for k, found in quiet.items():
        print(f"staleness {k}: {len(found)} of {len(steps[k])} steps were quiet")
    kept = {k: found if len(found) >= 3 else steps[k] for k, found in quiet.items()}
    now, ahead = medians(kept[0]), medians(kept[1])
    write, own = now["rollout"], now["score"] + now["train"]
    promised = max(write, own) + now["step"] - write - own
    for k, found in ((0, now), (1, ahead)):
        print(f"staleness {k}, medians in seconds: {', '.join(f'{name} {x:.2f}' for name, x in found.items())}")
    print(f"synchronous / ahead: {now['step'] / ahead['step']:.2f}")
    print(f"promised by the synchronous phases: {promised:.2f} s, {now['step'] / promised:.2f}")
    planned = {k: forecast.step_seconds for k, forecast in forecasts.items()}
    phases = ", ".join(f"{name} {x:.2f}" for name, x in forecasts[0].seconds.items())
    print(f"tropd plan: {planned[0]:.2f} and {planned[1]:.2f} s, {planned[0] / planned[1]:.2f} ({phases})")


def main(s: Settings) -> None:
    if not PYTHON.exists():
        sys.exit("vLLM is not installed: make vllm.")
    from tropd.planning import make_forecast, measure_here

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, Models(vocabulary=s.vocabulary))
        pin(s.cores[1])
        with serve(folder / "student", log=folder / "log", environment={"VLLM_SERVER_DEV_MODE": "1"}) as server:
            pin(s.cores[0])
            steps = measure(folder, server.url, server.process.pid, s)
            device = measure_here(seconds=2.0)
            runs = {k: run_of(folder, server.url, "planned", k, s) for k in (0, 1)}
            show(steps, {k: make_forecast(run, device) for k, run in runs.items()})
    print(json.dumps({"settings": asdict(s), "steps": {k: [asdict(x) for x in found] for k, found in steps.items()}}))


if __name__ == "__main__":
    main(tyro.cli(Settings))
