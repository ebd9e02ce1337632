"""`tropd exact`: TrOPD against OPD, Full FKL and SeqKD on exact tabular models, live."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tropd.cli.console import make_console
from tropd.config.flags import read_flags
from tropd.errors import ConfigError
from tropd.laboratory import exact_report as report
from tropd.laboratory.exact import ARMS, Curve, Setting, run_all, smallest_log_ratio

DEFAULT = Setting()


def demonstrate(setting: Setting, output: Path, *, workers: int, figure: bool, console: Console) -> list[Curve]:
    """Run everything, show it, and write results.json and the figure into `output`."""
    if figure and find_spec("matplotlib") is None:
        raise ConfigError(
            "a figure was asked for, but matplotlib is missing: pip install 'tropd[plot]', or --no-figure."
        )
    start, num_runs = time.perf_counter(), len(ARMS) * len(setting.learning_rates) * setting.num_seeds
    ratio = smallest_log_ratio(setting)
    console.print(report.opening(setting, num_runs, ratio), soft_wrap=True)
    curves = list(_watched(run_all(setting, workers), setting, num_runs, console))
    console.print(report.table(curves))
    for line in report.findings(curves) + report.LIMITS:
        console.print(line, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    written = [report.write_results(output, setting, curves, ratio)]
    if figure:
        written += report.draw(output, setting, curves)
    console.print(f"{time.perf_counter() - start:.0f} s. Written: {', '.join(map(str, written))}", soft_wrap=True)
    return curves


def _watched(curves: Iterable[Curve], setting: Setting, num_runs: int, console: Console) -> Iterator[Curve]:
    """A bar in a terminal, and a line for each method and learning rate that is done."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task, done = bar.add_task("runs", total=num_runs), []
        for curve in curves:
            bar.advance(task)
            done.append(curve)
            if len(done) == setting.num_seeds:
                bar.console.print(report.progress_line(done), soft_wrap=True)
                done = []
            yield curve


def _flags(
    setting: Annotated[Setting, tyro.conf.arg(name="")] = DEFAULT,
    output: Path = Path("runs/exact"),
    workers: int = 0,
    figure: bool = True,
) -> tuple[Setting, Path, int, bool]:
    """TrOPD against OPD, Full FKL and SeqKD on exact tabular models.

    Args:
        setting: The toy.
        output: Where results.json and the figure go.
        workers: Processes; 0 takes one for each core, at most 8.
        figure: Draw the figure (needs matplotlib).
    """
    return setting, output, workers, figure


def main(argv: list[str]) -> int:
    setting, output, workers, figure = read_flags(_flags, argv, "tropd exact")
    if workers < 0:
        raise ConfigError(f"--workers is {workers}: give a number of processes, or 0 for one for each core.")
    torch.set_num_threads(1)
    workers = workers or min(os.cpu_count() or 1, 8)
    demonstrate(setting, output, workers=workers, figure=figure, console=make_console())
    return 0
