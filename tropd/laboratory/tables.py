"""The tables of a comparison: scores with intervals, differences from the baseline, costs.

A number is a mean over seeds with a bootstrap interval over seeds; with few seeds it is rather too narrow.  The best
learning rate of a method is chosen by its mean score on the same seeds, which favours every method equally.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from rich.table import Table
from rich.text import Text

from tropd.evaluation.statistics import bootstrap_interval, paired_difference, probability_of_improvement
from tropd.laboratory.lab import Lab, rates_of
from tropd.laboratory.trial import Outcome


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """A table: for a terminal, or as Markdown."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def shown(self) -> Table:
        table = Table(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def markdown(self) -> str:
        lines = [self.columns, ("---", *["---:"] * (len(self.columns) - 1)), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A method on a testbed: its outcomes by learning rate, in the order of the seeds."""

    method: str
    by_rate: dict[float, list[Outcome]]

    @property
    def best_rate(self) -> float:
        return max(self.by_rate, key=lambda rate: mean_score(self.by_rate[rate]))

    @property
    def best(self) -> list[Outcome]:
        return self.by_rate[self.best_rate]


def mean_score(outcomes: Sequence[Outcome]) -> float:
    return statistics.fmean(o.score for o in outcomes)


def arms_of(lab: Lab, outcomes: Iterable[Outcome], testbed: str, budget: str = "") -> list[Arm]:
    """The methods that have outcomes."""
    here = [o for o in outcomes if (o.testbed, o.budget) == (testbed, budget)]
    arms = []
    for method in lab.methods:
        of_rate = {r: [o for o in here if (o.method, o.learning_rate) == (method, r)] for r in rates_of(lab, testbed)}
        by_rate = {rate: sorted(found, key=lambda o: o.seed) for rate, found in of_rate.items() if found}
        if by_rate:
            arms.append(Arm(method=method, by_rate=by_rate))
    return arms


def sheets(lab: Lab, outcomes: Sequence[Outcome]) -> list[Sheet]:
    """All tables of a comparison: for each testbed, then over all testbeds."""
    found = []
    for testbed, budget in product(lab.testbeds, lab.budgets or ("",)):
        if arms := arms_of(lab, outcomes, testbed, budget):
            name = f"{testbed}, equal {budget}" if budget else testbed
            found += [score_sheet(lab, testbed, arms), *control_sheet(lab, name, arms)]
            found += [probe_sheet(name, arms), cost_sheet(name, arms)]
    if not lab.budgets and len(lab.testbeds) > 1:
        found += improvement_sheet(lab, outcomes)
    return found


def score_sheet(lab: Lab, testbed: str, arms: Sequence[Arm]) -> Sheet:
    """Scores at every learning rate and at the best, and the difference from the baseline at its best."""
    rates = rates_of(lab, testbed)
    base = next((arm for arm in arms if arm.method == lab.compared_with), None)
    rows = []
    for arm in sorted(arms, key=lambda arm: -mean_score(arm.best)):
        cells = [_interval([o.score for o in arm.by_rate.get(rate, [])]) for rate in rates]
        best = [] if len(rates) == 1 else [f"{_interval([o.score for o in arm.best])} at {arm.best_rate:g}"]
        fallen = sum(o.status == "diverged" for found in arm.by_rate.values() for o in found)
        name = arm.method + (f" ({fallen} diverged)" if fallen else "")
        rows.append((name, *cells, *best, *_against(arm, base)))
    first = [o for arm in arms for found in arm.by_rate.values() for o in found]
    starts = {o.seed: o.scores[0] for o in first}
    heads = [f"rate {rate:g}" for rate in rates] + ([] if len(rates) == 1 else ["best rate"])
    return Sheet(
        title=f"{testbed}: accuracy after {_amount(lab, first)}, {len(starts)} seed{'s' if len(starts) > 1 else ''}",
        columns=("method", *heads, f"minus {lab.compared_with}, paired", f"P(better than {lab.compared_with})"),
        rows=tuple(rows),
        note=f"Before training: {_interval(list(starts.values()))}."
        + (" In brackets: 95 % bootstrap interval over seeds." if len(starts) > 1 else ""),
    )


def _amount(lab: Lab, outcomes: Sequence[Outcome]) -> str:
    """How long the runs are."""
    budget = outcomes[0].budget
    if budget == "tokens":
        return f"about {lab.budgets[budget]:,.0f} tokens trained"
    if budget == "seconds":
        return f"about {lab.budgets[budget]:g} CPU seconds of training"
    return f"{max(o.steps[-1] for o in outcomes)} steps"


def control_sheet(lab: Lab, testbed: str, arms: Sequence[Arm]) -> list[Sheet]:
    """Each method that has controls minus each of them, seed by seed, both at their best learning rates."""
    there = {arm.method: arm for arm in arms}
    pairs = [(a, b) for a, controls in lab.controls.items() for b in controls if a in there and b in there]
    if not pairs:
        return []
    rows = []
    for method, control in pairs:
        arm, other = there[method], there[control]
        gain, chance = _against(arm, other)
        rows.append((method, control, f"{mean_score(arm.best):.3f}", f"{mean_score(other.best):.3f}", gain, chance))
    columns = ("method", "its control", "accuracy", "the control's", "minus the control, paired", "P(better)")
    return [Sheet(title=f"{testbed}: methods against their controls", columns=columns, rows=tuple(rows))]


def _against(arm: Arm, base: Arm | None) -> tuple[str, str]:
    if base is None or base.method == arm.method:
        return "", ""
    theirs = {o.seed: o.score for o in base.best}
    pairs = [(o.score, theirs[o.seed]) for o in arm.best if o.seed in theirs]
    if not pairs:
        return "", ""
    ours, others = zip(*pairs, strict=True)
    gain, chance = paired_difference(ours, others), probability_of_improvement([ours], [others])
    if len(pairs) == 1:
        return f"{gain.mean:+.3f}", ""
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]", f"{chance:.2f}"


_PROBES = {
    "trust share": "trust/share",
    "lowest log-ratio of a step": "ratio/min",
    "top-k overlap": "overlap/top_k",
    "entropy of the student": "entropy/student",
}


def probe_sheet(testbed: str, arms: Sequence[Arm]) -> Sheet:
    """How training went at each method's best learning rate: first ten steps, last ten steps."""
    rows = []
    for arm in arms:
        norms = [o.gradient_norm for o in arm.best]
        ends = [(statistics.fmean(n[:10]), statistics.fmean(n[-10:])) for n in norms]
        norm = f"{statistics.fmean(a for a, _ in ends):.2f} → {statistics.fmean(b for _, b in ends):.2f}"
        largest = f"{max(max(n) for n in norms):.1f}"
        length = f"{statistics.fmean(o.lengths[-1] for o in arm.best):.1f}"
        rows.append((arm.method, norm, largest, length, *(_ends(arm.best, name) for name in _known(arms))))
    return Sheet(
        title=f"{testbed}: how training went at the best rate, first → last ten steps",
        columns=("method", "gradient norm", "its largest", "answer length", *_known(arms)),
        rows=tuple(rows),
    )


def _known(arms: Sequence[Arm]) -> list[str]:
    return [name for name, probe in _PROBES.items() if any(probe in o.probes for arm in arms for o in arm.best)]


def _ends(outcomes: Sequence[Outcome], name: str) -> str:
    found = [o.probes[_PROBES[name]] for o in outcomes if _PROBES[name] in o.probes]
    if not found:
        return ""
    return f"{statistics.fmean(a for a, _ in found):.3g} → {statistics.fmean(b for _, b in found):.3g}"


def cost_sheet(testbed: str, arms: Sequence[Arm]) -> Sheet:
    """The cost of one run.  Only the seconds depend on the machine."""
    if any(o.budget for arm in arms for o in arm.best):
        return _budget_sheet(testbed, arms)
    rows = []
    for arm in arms:
        means = [statistics.fmean(o.tokens[a] for o in arm.best) for a in ("student", "teacher")]
        rows.append((arm.method, *(f"{m:,.0f}" for m in means), f"{statistics.fmean(o.seconds for o in arm.best):.1f}"))
    return Sheet(
        title=f"{testbed}: cost of one run",
        columns=(
            "method",
            "student tokens trained on",
            "teacher tokens trained on",
            "CPU seconds, evaluation included",
        ),
        rows=tuple(rows),
    )


def _budget_sheet(testbed: str, arms: Sequence[Arm]) -> Sheet:
    """What was trained, what was written for it, and how long that took."""
    rows = []
    for arm in arms:
        steps, trained, seconds = (
            statistics.fmean(of(o) for o in arm.best)
            for of in (lambda o: o.steps[-1], lambda o: o.trained, lambda o: o.training_seconds)
        )
        written = [f"{statistics.fmean(o.tokens[author] for o in arm.best):,.0f}" for author in ("student", "teacher")]
        rows.append((arm.method, f"{steps:.0f}", f"{trained:,.0f}", *written, f"{seconds:.1f}"))
    return Sheet(
        title=f"{testbed}: cost of one run",
        columns=(
            "method",
            "steps",
            "tokens trained",
            "written by the student",
            "written by the teacher",
            "CPU seconds of training",
        ),
        rows=tuple(rows),
        note="A token is trained if some term weighs it, whoever wrote it.",
    )


def improvement_sheet(lab: Lab, outcomes: Sequence[Outcome]) -> list[Sheet]:
    """The chance to beat the baseline on a random testbed, each method at its best learning rate."""
    by_bed = [{arm.method: arm for arm in arms_of(lab, outcomes, bed)} for bed in lab.testbeds]
    complete = [m for m in lab.methods if all(m in arms for arms in by_bed)]
    if lab.compared_with not in complete:
        return []
    scores = {m: [[o.score for o in arms[m].best] for arms in by_bed] for m in complete}
    base = scores[lab.compared_with]
    rows = [(m, f"{probability_of_improvement(scores[m], base):.2f}") for m in complete if m != lab.compared_with]
    rows.sort(key=lambda row: -float(row[1]))
    return [
        Sheet(
            title=f"over {len(lab.testbeds)} testbeds",
            columns=("method", f"P(better than {lab.compared_with})"),
            rows=tuple(rows),
        )
    ]


def _interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    low, high = bootstrap_interval(values)
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"
