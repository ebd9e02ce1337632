"""The tiles beside the verdict, each a number with its curve, and the table of several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tropd.evaluation.statistics import Difference
from tropd.report.captions import Format, say
from tropd.report.history import History
from tropd.report.series import average
from tropd.report.verdict import against, gain, last_score, metric_of, score_at, signed

_TILES: tuple[tuple[str, str, Format], ...] = (
    ("probe/trust/share", "trusted share", "share"),
    ("probe/overlap/top_k", "shared top-k", "share"),
    ("probe/entropy/student", "student entropy", "nats"),
    ("probe/length/mean", "answer length", "tokens"),
    ("gradient_norm", "gradient norm", "number"),
)
WIDTH, HEIGHT = 100.0, 26.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    label: str
    value: str
    note: str
    course: str
    """Points of a polyline; "" where there is no course."""


def tiles(run: History) -> list[Tile]:
    """A tile for each number that the run recorded."""
    shown = []
    metric = metric_of(run)
    if metric is not None:
        at = sorted(run.evaluations)
        values = np.asarray([run.evaluations[step].get(metric, math.nan) for step in at])
        shown += _tile(f"held-out {metric}", values, "number")
    for column, label, kind in _TILES:
        if column in run.values:
            shown += _tile(label, run.column(column), kind)
    seconds = sum(float(np.nansum(run.column(f"seconds/{name}"))) for name in run.names("seconds/"))
    if seconds > 0:
        tokens = sum(float(np.nansum(run.column(f"tokens/{name}"))) for name in ("student", "teacher"))
        note = f"{tokens:,.0f} tokens written" if tokens else ""
        shown.append(Tile(label="time in steps", value=duration(seconds), note=note, course=""))
    return shown


def _tile(label: str, values: np.ndarray, kind: Format) -> list[Tile]:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return []
    last, first = say(float(finite[-1]), kind), say(float(finite[0]), kind)
    note = f"from {first}" if len(finite) > 1 else "one value"
    return [Tile(label=label, value=last, note=note, course=polyline(values))]


def polyline(values: np.ndarray, num_points: int = 60) -> str:
    shown = average(values, num_points)
    finite = np.isfinite(shown)
    if finite.sum() < 2:
        return ""
    low, high = float(shown[finite].min()), float(shown[finite].max())
    x = np.linspace(0.0, WIDTH, len(shown))[finite]
    y = HEIGHT - 2 - (shown[finite] - low) / ((high - low) or 1.0) * (HEIGHT - 4)
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x.tolist(), y.tolist(), strict=True))


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def table(runs: Sequence[History]) -> list[dict[str, Any]]:
    """One row per run; `sort` holds what a column is sorted by."""
    differences = [None if i == 0 else against(run, runs[0]) for i, run in enumerate(runs)]
    reach = _reach(differences)
    rows = []
    for number, (run, gap) in enumerate(zip(runs, differences, strict=True)):
        end, start, won = last_score(run), score_at(run, 0, metric_of(run)), gain(run)
        rows.append(
            {
                "number": number,
                "name": run.name,
                "method": run.method,
                "steps": f"{len(run.steps):,}" + (f" of {run.planned_steps:,}" if run.planned_steps else ""),
                "start": f"{start.value:.3f}" if start else "",
                "end": str(end) if end else "",
                "gain": difference_text(won),
                "gap": difference_text(gap) if number else "first run",
                "forest": _forest(gap, reach),
                "alarms": len(run.alarms),
                "problems": len(run.problems),
                "sort": [
                    run.name,
                    run.method,
                    len(run.steps),
                    start.value if start else "",
                    end.value if end else "",
                    won.mean if won else "",
                    gap.mean if gap else "",
                    len(run.alarms),
                    len(run.problems),
                ],
            }
        )
    return rows


def difference_text(gap: Difference | None) -> str:
    return "" if gap is None else f"{signed(gap.mean)} [{signed(gap.low)}, {signed(gap.high)}]"


def _reach(gaps: Sequence[Difference | None]) -> float:
    return max((max(abs(gap.low), abs(gap.high)) for gap in gaps if gap), default=0.0)


def _forest(gap: Difference | None, reach: float) -> dict[str, float] | None:
    """An interval around a zero line, in percent of the width."""
    if gap is None or not reach:
        return None

    def place(x: float) -> float:
        return round(50.0 + 46.0 * x / reach, 2)

    return {"low": place(gap.low), "mean": place(gap.mean), "high": place(gap.high)}
