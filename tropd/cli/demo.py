"""tropd demo: OPD and TrOPD side by side on the small teacher and student that come with the package, live."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live

from tropd.cli.arguments import Arguments
from tropd.cli.console import make_console
from tropd.errors import ConfigError

if TYPE_CHECKING:
    from tropd.laboratory.lab import Lab


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd demo", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/demo"), help="the folder; an earlier demo's is renewed"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method")
    parser.add_argument("--steps", type=int, help="by default what the testbed suggests")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    asked = parser.parse_args(argv)
    if asked.seeds < 1 or asked.workers < 0:
        raise ConfigError(f"--seeds {asked.seeds} --workers {asked.workers}: give at least one seed, and workers or 0.")
    _demonstrate(asked.output, asked.seeds, asked.steps, asked.workers or len(os.sched_getaffinity(0)), make_console())
    return 0


def _demonstrate(output: Path, num_seeds: int, steps: int | None, workers: int, console: Console) -> None:
    from tropd.laboratory import demo
    from tropd.laboratory.runner import compare
    from tropd.laboratory.tables import arms_of, score_sheet

    _renew(output)
    lab, started = demo.lab_of(output, num_seeds, steps), time.perf_counter()
    console.print(demo.OPENING, soft_wrap=True)
    with _shown(lab, console):
        outcomes = compare(lab, workers=workers, tell=lambda line: console.print(line, soft_wrap=True, markup=False))
    if len(outcomes) < num_seeds * len(lab.methods):
        raise ConfigError("the demonstration was stopped before it was done. Run it again.")
    console.print(score_sheet(lab, demo.TESTBED, arms_of(lab, outcomes, demo.TESTBED)).shown())
    for line in (*demo.findings(lab, outcomes), demo.LIMITS):
        console.print(line, soft_wrap=True, markup=False)
    console.print(
        f"{time.perf_counter() - started:.0f} s. Results: {output / 'results.jsonl'}. The report:", soft_wrap=True
    )
    _report(output)


def _renew(output: Path) -> None:
    """Only what an earlier demonstration wrote is removed."""
    there = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if "results.jsonl" in there and there <= {"results.jsonl", "trials", "report.html"}:
        shutil.rmtree(output)
    elif there or (output.exists() and not output.is_dir()):
        raise ConfigError(f"{output} holds something else than an earlier demonstration. Name another --output.")


@contextmanager
def _shown(lab: Lab, console: Console) -> Iterator[None]:
    """In a terminal, a table that follows the records on disk; elsewhere a line per run is enough."""
    if not console.is_terminal:
        yield
        return
    from tropd.laboratory import demo

    over = threading.Event()
    with Live(console=console, refresh_per_second=4, transient=True) as view:

        def follow() -> None:
            while not over.wait(0.5):
                view.update(demo.live(lab))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _report(output: Path) -> None:
    """The page about these runs, if what draws it is installed."""
    missing = [name for name in ("plotly", "jinja2") if find_spec(name) is None]
    if missing:
        print(f"For the report of these runs: pip install 'tropd[report]', then tropd report {output}/trials/*")
        return
    from tropd.cli.report import main as report

    runs = sorted(str(path.parent) for path in (output / "trials").glob("*/records.jsonl"))
    report([*runs, "--output", str(output / "report.html")])
