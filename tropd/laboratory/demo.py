"""`tropd demo`: OPD and TrOPD side by side on the small teacher and student that come with the package.

It is a comparison like any other (tropd.laboratory), with a live view and a page at the end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Group
from rich.table import Table
from rich.text import Text

from tropd.evaluation.statistics import paired_difference
from tropd.laboratory.lab import Lab, Trial, trials
from tropd.laboratory.tables import arms_of
from tropd.laboratory.trial import FIRST_STEPS, Outcome
from tropd.methods import OPD, TrOPD
from tropd.monitoring.records import read_records
from tropd.objective.schedules import Schedule
from tropd.types import StepRecord

TESTBED = "embedded/nano-hard"
_SPARKS = "▁▂▃▄▅▆▇█"
OPENING = (
    "A teacher of 86,000 parameters solves sums such as 3-1+4? step by step (99 %). The student could too, but writes "
    "terse answers and gets 20 % right; the teacher finds most of its tokens impossible. Every method gets the same "
    "prompts, and writes its own answers to them."
)
LIMITS = (
    "What this does not show: a better end. After 120 steps OPD has caught up (.94 against .92 on five such pairs) and "
    "plain imitation of the teacher's texts is ahead of both (.96); on a milder mismatch OPD is as good from the start "
    "(docs/results.md). With the paper's own settings (beta .001, prefixes from 1) TrOPD is slower than OPD at this "
    "budget. A vocabulary of 22 and answers of 20 tokens are no test of what the paper claims for large models."
)


def lab_of(output: Path, num_seeds: int, steps: int | None = None) -> Lab:
    """The comparison of the demonstration."""
    start = Schedule(shape="cosine", start=0.5, end=0.0)
    return Lab(
        output=str(output),
        testbeds=(TESTBED,),
        methods={"OPD": OPD(), "TrOPD": TrOPD(top_k=4, beta=1.0, prefix=start), "TrOPD (paper)": TrOPD(top_k=4)},
        seeds=tuple(range(num_seeds)),
        steps=steps,
        num_evaluations=4,
        save_rollouts=8,
    )


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of one method's runs."""

    method: str
    steps: tuple[StepRecord, ...]
    """The records of the latest run."""
    before: float | None
    latest: float | None


def look(lab: Lab) -> list[Progress]:
    """Read the progress from records on disk, while other processes write them."""
    found: dict[str, list[tuple[dict[str, float], list[StepRecord]]]] = {method: [] for method in lab.methods}
    for trial in trials(lab):
        path = records_of(lab, trial)
        if path.exists():
            records = read_records(path)
            found[trial.method].append((records.header.get("before") or {}, records.steps))
    return [_progress(lab, method, runs) for method, runs in found.items()]


def records_of(lab: Lab, trial: Trial) -> Path:
    return Path(lab.output) / "trials" / trial.folder / "records.jsonl"


def _progress(lab: Lab, method: str, runs: list[tuple[dict[str, float], list[StepRecord]]]) -> Progress:
    name = f"avg@{lab.num_samples}"
    before = [header[name] for header, _ in runs if name in header]
    latest = [next((r.evaluation[name] for r in reversed(s) if r.evaluation), header.get(name)) for header, s in runs]
    known = [score for score in latest if score is not None]
    return Progress(
        method=method,
        steps=tuple(runs[-1][1]) if runs else (),
        before=statistics.fmean(before) if before else None,
        latest=statistics.fmean(known) if known else None,
    )


def live(lab: Lab) -> Group:
    """The table that is redrawn during the runs."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("", "step", "accuracy before", "so far", "gradient norm, log scale", "now"):
        table.add_column(column, justify="left" if column in ("", "gradient norm, log scale") else "right")
    for row in look(lab):
        norms = [r.gradient_norm for r in row.steps]
        table.add_row(
            row.method,
            str(row.steps[-1].step + 1) if row.steps else "waiting",
            "" if row.before is None else f"{row.before:.2f}",
            "" if row.latest is None else f"{row.latest:.2f}",
            spark(norms),
            f"{norms[-1]:.2f}" if norms else "",
        )
    return Group(Text(""), table)


def spark(values: Sequence[float], low: float = 0.01, high: float = 100.0, width: int = 40) -> str:
    """A line of blocks on a fixed logarithmic scale, so that methods can be compared."""
    span = math.log(high / low)
    shares = [math.log(min(max(v, low), high) / low) / span for v in values[-width:]]
    return "".join(_SPARKS[min(int(s * len(_SPARKS)), len(_SPARKS) - 1)] for s in shares)


def findings(lab: Lab, outcomes: Sequence[Outcome]) -> list[str]:
    """The results, in sentences made from the numbers."""
    arms = {arm.method: arm.best for arm in arms_of(lab, outcomes, TESTBED)}
    lines = [_story(method, found) for method, found in arms.items()]
    opd, tropd = arms.get("OPD", []), arms.get("TrOPD", [])
    if len(opd) == len(tropd) > 1:
        gain = paired_difference([o.score for o in tropd], [o.score for o in opd])
        sure = "the interval excludes zero" if gain.excludes_zero else "which may be chance"
        span = f"{gain.mean:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]"
        lines.append(f"TrOPD minus OPD: {span} over {gain.num_items} seeds; {sure}.")
    return lines


def _story(method: str, outcomes: Sequence[Outcome]) -> str:
    scores = [o.score for o in outcomes]
    low = statistics.fmean(o.intervals[-1][0] for o in outcomes)
    high = statistics.fmean(o.intervals[-1][1] for o in outcomes)
    first = statistics.fmean(n for o in outcomes for n in o.gradient_norm[:FIRST_STEPS])
    last = statistics.fmean(n for o in outcomes for n in o.gradient_norm[-FIRST_STEPS:])
    return (
        f"{method}: accuracy {outcomes[0].scores[0]:.2f} → {statistics.fmean(scores):.2f} [{low:.2f}, {high:.2f}]; "
        f"gradient norm {first:.2f} in the first ten steps, {last:.2f} in the last ten."
    )
