"""Which charts a report draws, from which columns, and the sentence that says what each one shows.

A chart of one column compares all runs.  A chart of several columns shows one run at a time when there are several.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from tropd.report.captions import Format, say_change, say_range
from tropd.report.history import History
from tropd.report.series import average, pack, shorten
from tropd.report.verdict import metric_of

Kind = Literal["lines", "stacked", "band", "heat", "scores", "marks"]
POINTS, FEWEST_POINTS, POINTS_OF_ALL = 1500, 120, 20_000
"""Points per chart and run: of one run, at least, and of all runs together."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One column and what it is called."""

    column: str
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    id: str
    section: str
    title: str
    about: str
    """What is drawn, as a sentence."""
    lines: Callable[[Sequence[History]], list[Line]]
    """Those of the lines that some run has."""
    kind: Kind = "lines"
    format: Format = "number"
    log: bool = False
    zero: bool = True
    """Whether 0 belongs to the axis."""
    rests: bool = False
    """Whether its probe may rest between steps: the line goes on over those."""


def fixed(**labels: str) -> Callable[[Sequence[History]], list[Line]]:
    """Lines by column; `__` in a keyword stands for the slash."""
    wanted = [Line(column=name.replace("__", "/"), label=label) for name, label in labels.items()]
    return lambda runs: [line for line in wanted if any(line.column in run.values for run in runs)]


def every(prefix: str, order: Sequence[str] = ()) -> Callable[[Sequence[History]], list[Line]]:
    """All columns that begin so, those of `order` first."""

    def lines(runs: Sequence[History]) -> list[Line]:
        names = list(dict.fromkeys(name for run in runs for name in run.names(prefix)))
        names.sort(key=lambda name: order.index(name) if name in order else len(order))
        return [Line(column=prefix + name, label=name.replace("_", " ")) for name in names]

    return lines


def probes(**labels: str) -> Callable[[Sequence[History]], list[Line]]:
    return fixed(**{f"probe__{name}": label for name, label in labels.items()})


def ratio_quantiles(runs: Sequence[History]) -> list[Line]:
    names = {"min": "least", "p01": "1 %", "p05": "5 %", "p50": "median", "p95": "95 %", "p99": "99 %", "max": "most"}
    there = any("probe/ratio/p50" in run.values for run in runs)
    return [Line(column=f"probe/ratio/{name}", label=label) for name, label in names.items()] if there else []


def positions(what: str) -> Callable[[Sequence[History]], list[Line]]:
    def lines(runs: Sequence[History]) -> list[Line]:
        bins = sorted({int(n.split("/")[0]) for run in runs for n in run.names("probe/position/") if n.endswith(what)})
        return [Line(column=f"probe/position/{b}/{what}", label=f"{b + 1} of {len(bins)}") for b in bins]

    return lines


def of_teachers(probe: str) -> Callable[[Sequence[History]], list[Line]]:
    """A probe of each of several teachers."""

    def lines(runs: Sequence[History]) -> list[Line]:
        names = [name for run in runs for name in run.names("probe/teachers/") if name.endswith(f"/{probe}")]
        teachers = {name: name.removesuffix(f"/{probe}") for name in names}
        return [Line(column=f"probe/teachers/{name}", label=label) for name, label in teachers.items()]

    return lines


def of_followers(number: str) -> Callable[[Sequence[History]], list[Line]]:
    """A number of each teacher that follows the student."""

    def lines(runs: Sequence[History]) -> list[Line]:
        names = dict.fromkeys(name for run in runs for name in run.names("probe/follow/"))
        found = [name for name in names if name == number or name.endswith(f"/{number}")]
        return [Line(column=f"probe/follow/{n}", label=n.removesuffix(number).strip("/") or "teacher") for n in found]

    return lines


def evaluated(runs: Sequence[History]) -> list[Line]:
    """Every score of a single run; of several runs the one that the verdict is about."""
    if len(runs) > 1:
        names = [name for run in runs if (name := metric_of(run))]
    else:
        last = runs[0].evaluations.get(max(runs[0].evaluations, default=0), {})
        names = [name for name in last if "/" not in name and name not in ("num_prompts", "pass@1")]
    return [Line(column=name, label=name) for name in dict.fromkeys(names)]


def alarm_names(runs: Sequence[History]) -> list[Line]:
    names = dict.fromkeys(name for run in runs for _, name, _ in run.alarms)
    return [Line(column=name, label=name.replace("_", " ")) for name in names]


def points_for(num_runs: int) -> int:
    return max(FEWEST_POINTS, min(POINTS, POINTS_OF_ALL // max(num_runs, 1)))


def chart_as_data(chart: Chart, runs: Sequence[History]) -> dict[str, Any] | None:
    """What the page draws; None where no run has any of it."""
    lines = chart.lines(runs)
    parts = [_of_run(chart, lines, run, points_for(len(runs))) for run in runs]
    if not lines or not any(part["x"] for part in parts):
        return None
    return {
        "id": chart.id,
        "section": chart.section,
        "kind": chart.kind if chart.kind != "stacked" or _adds_up(lines, runs) else "lines",
        "title": chart.title,
        "captions": captions(chart, lines, runs),
        "format": chart.format,
        "log": chart.log,
        "zero": chart.zero,
        "limit": _limit(runs) if chart.id == "gradient" else None,
        "lines": [{"column": line.column, "label": line.label} for line in lines],
        "runs": parts,
    }


def _limit(runs: Sequence[History]) -> float | None:
    """The length at which gradients are cut, where all runs have the same."""
    limits = {run.config.get("optimizer.max_gradient_norm") for run in runs}
    text = limits.pop() if len(limits) == 1 else None
    try:
        limit = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return limit if math.isfinite(limit) and limit > 0 else None


def captions(chart: Chart, lines: Sequence[Line], runs: Sequence[History]) -> list[str]:
    """One for each run where runs are shown one at a time, else one for all."""
    if chart.kind == "scores":
        return [chart.about]
    if chart.kind == "marks":
        counts = [f"{len(run.alarms):,}" for run in runs]
        return [f"{chart.about} {count} were raised." for count in counts]
    if len(lines) == 1 and len(runs) > 1:
        ends = {run.name: run.column(lines[0].column) for run in runs if lines[0].column in run.values}
        return [f"{chart.about} {say_range(ends, chart.format)}"]
    return [f"{chart.about} {_what_happened(chart, lines, run)}".strip() for run in runs]


def _what_happened(chart: Chart, lines: Sequence[Line], run: History) -> str:
    told = [line for line in lines if line.column in run.values]
    if chart.kind == "band":
        told = [line for line in told if line.label in ("1 %", "median", "99 %")]
    if chart.kind == "heat" and len(told) > 2:
        told = [told[0], told[-1]]
    if not told:
        return "This run has no record of it."
    return " ".join(say_change(line.label, run.steps, run.column(line.column), chart.format) for line in told)


def _adds_up(lines: Sequence[Line], runs: Sequence[History]) -> bool:
    """Parts are stacked only where they are parts: terms may share tokens."""
    if not lines[0].column.startswith("share/"):
        return True
    sums = [np.nansum([run.column(line.column) for line in lines], axis=0) for run in runs if run.steps]
    return all(bool((total <= 1.0 + 1e-6).all()) for total in sums)


def _of_run(chart: Chart, lines: Sequence[Line], run: History, limit: int) -> dict[str, Any]:
    if chart.kind == "scores":
        return _scores(lines, run)
    if chart.kind == "marks":
        return _marks(lines, run)
    there = {line.column: run.column(line.column) for line in lines if line.column in run.values}
    if not there:
        return {"x": [], "y": {}}
    if chart.kind == "heat":
        steps = average(np.asarray(run.steps, dtype=np.float64), 200)
        y = {name: shorten(average(column, 200)) for name, column in there.items()}
        return {"x": shorten(steps), "y": y, "shown": len(steps), "of": len(run.steps)}
    steps = run.steps
    if chart.rests:
        asked_N = np.logical_or.reduce([np.isfinite(column) for column in there.values()])
        steps = np.asarray(steps)[asked_N].tolist()
        there = {name: column[asked_N] for name, column in there.items()}
    packed = pack(steps, there, limit, gaps=not chart.rests)
    return {**packed, "shown": min(len(packed["x"]), len(steps)), "of": len(steps)}


def _scores(lines: Sequence[Line], run: History) -> dict[str, Any]:
    steps = sorted(run.evaluations)
    y: dict[str, list[float | None]] = {}
    for line in lines:
        for end in ("", "/low", "/high"):
            column = [run.evaluations[step].get(line.column + end, np.nan) for step in steps]
            if np.isfinite(column).any():
                y[line.column + end] = shorten(np.asarray(column))
    return {"x": steps if y else [], "y": y}


def _marks(lines: Sequence[Line], run: History) -> dict[str, Any]:
    """Alarms at neighbouring steps are one stretch, so an alarm at every step is one mark."""
    y: dict[str, list[list[int]]] = {}
    for line in lines:
        stretches: list[list[int]] = []
        for step in sorted({step for step, name, _ in run.alarms if name == line.column}):
            if stretches and step == stretches[-1][1] + 1:
                stretches[-1][1] = step
            else:
                stretches.append([step, step])
        y[line.column] = _at_most(stretches, 500)
    return {"x": [run.steps[0], run.steps[-1]] if run.steps else [], "y": y}


def _at_most(stretches: list[list[int]], limit: int) -> list[list[int]]:
    """Join the nearest marks until there are few."""
    if len(stretches) <= limit:
        return stretches
    gaps = np.asarray([b[0] - a[1] for a, b in pairwise(stretches)])
    cut = set(np.argsort(-gaps, kind="stable")[: limit - 1].tolist())
    joined = [list(stretches[0])]
    for i, stretch in enumerate(stretches[1:]):
        if i in cut:
            joined.append(list(stretch))
        else:
            joined[-1][1] = stretch[1]
    return joined
