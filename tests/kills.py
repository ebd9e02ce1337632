"""Runs that are killed at random moments, again and again, and then compared to the last bit with runs left alone.

python -m tests.kills 120          kills 120 times, over every case of tests.small_runs and one with servers
python -m tests.kills 20 lora      over the cases named
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import run_case
from tests.run_case import Order
from tests.small_runs import CASES, write_models, write_run

LONG: dict[str, Any] = {"steps": 12, "evaluation": {"every": 4}}
KILLS_OF_A_RUN = 8
SERVED = "served"

Moment = tuple[Callable[[Path], bool], float]
"""Something to wait for in a run's folder, and the seconds to wait after it."""


@dataclass(kw_only=True)
class Count:
    """What came of one case."""

    case: str
    runs: int = 0
    kills: int = 0
    differ: int = 0
    """Runs that did not end like the one left alone."""


def kill_at(path: Path, directory: Path, moments: Sequence[Moment]) -> list[str]:
    """Kill the run at each moment, starting it again each time, then let it end.  What each kill left unfinished."""

    def order() -> Order:
        return Order(train=None if (directory / "run.toml").exists() else path, directory=directory)

    left = []
    for ready, delay in moments:
        if run_case.start(order()).kill_when(lambda ready=ready: ready(directory), delay):
            left.append(" ".join(p.name for p in directory.rglob("*") if p.suffix == ".tmp" or "journal" in p.name))
    if not (directory / "model").exists():
        ended = run_case.start(order()).wait()
        assert ended.code == 0, f"{ended.code} {ended.error} {ended.message} {ended.said}"
    return left


def recorded(num_steps: int) -> Callable[[Path], bool]:
    return lambda directory: run_case.num_recorded(directory) >= num_steps


def random_moments(seed: int, num_kills: int, steps: int) -> list[Moment]:
    rng = random.Random(seed)
    last = steps - 3  # a process that ends before it is killed would prove nothing
    return [(recorded(n * last // num_kills + rng.randint(0, 1)), rng.uniform(0.0, 0.15)) for n in range(num_kills)]


def of_every_case(
    folder: Path, num_kills: int, seed: int = 0, cases: Sequence[str] = (*CASES, SERVED)
) -> Iterator[Count]:
    """Kill runs of each case in turn until all of them together were killed so often."""
    models = write_models(folder / "models")
    left = num_kills
    for number, case in enumerate(cases):
        wanted = -(-left // (len(cases) - number))
        count = of_case(models, folder / case, case, wanted, seed)
        left -= count.kills
        yield count


def of_case(models: Path, folder: Path, case: str, num_kills: int, seed: int) -> Count:
    count = Count(case=case)
    with ExitStack() as servers:
        base, changes = (case, LONG) if case != SERVED else ("tropd", LONG | _served(models, servers))
        alone = folder / "alone"
        ended = run_case.train(write_run(models, alone, base, **changes), alone)
        assert ended.code == 0, ended.said
        expected = run_case.trace(alone)
        while count.kills < num_kills:
            killed = folder / f"killed_{count.runs}"
            moments = random_moments(1000 * seed + count.runs, min(KILLS_OF_A_RUN, num_kills - count.kills), 12)
            left = kill_at(write_run(models, killed, base, **changes), killed, moments)
            count.runs, count.kills = count.runs + 1, count.kills + len(left)
            count.differ += run_case.trace(killed) != expected
    return count


def _served(models: Path, servers: ExitStack) -> dict[str, Any]:
    """Both models on servers: texts and scores are kept, and the next batch is written and scored ahead."""
    from tests.servers.mini import MiniServer

    student, teacher = (servers.enter_context(MiniServer(models / name)).url for name in ("student", "teacher"))
    return {
        "rollout": {"servers": [student], "staleness": 1},
        "teacher": {"servers": [teacher], "score_cache": True},
    }


def main(num_kills: int, cases: Sequence[str]) -> int:
    differ = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for count in of_every_case(Path(folder), num_kills, cases=cases or (*CASES, SERVED)):
            print(f"{count.case}: {count.runs} runs, {count.kills} kills, {count.differ} differ", flush=True)
            differ, total = differ + count.differ, total + count.kills
    print(f"{total} kills, {differ} runs differ")
    return 1 if differ else 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
