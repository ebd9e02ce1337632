"""The report of `tropd exact` on its curves.  Every sentence about a method is made from the numbers."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text

from tropd.laboratory.exact import ARMS, Curve, Setting
from tropd.version import __version__

# Student's t, two-sided 95 %, by degrees of freedom; beyond the last entry it is kept, which is a little too wide.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
FIRST_STEPS = 10
NAMES = {"reverse_kl": "KL(student || teacher)", "forward_kl": "KL(teacher || student)"}
LIMITS = [
    "What this does not show: a table has separate numbers for every state, so nothing generalises, a state that is "
    "not visited is not learned, and forgetting cannot happen. The teacher's texts are new at every visit, which helps "
    "SeqKD and the prefixes, and asking the teacher to write costs nothing here. One optimiser, a few learning rates, "
    "a vocabulary of a few tokens: which method is better on language models is a question for language models."
]
COLOURS = {"TrOPD": "#0072b2", "TrOPD, no prefixes": "#56b4e9", "OPD": "#d55e00", "Full FKL": "#009e73"}


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over seeds and the half-width of its 95 % interval (Student's t); NaN from one seed."""

    mean: float
    half_width: float

    def __str__(self) -> str:
        return f"{self.mean:.3g}" if math.isnan(self.half_width) else f"{self.mean:.3g} ± {self.half_width:.2g}"


def mean_of(values: Sequence[float]) -> Mean:
    if len(values) < 2:
        return Mean(values[0], math.nan)
    t = _T95[min(len(values) - 1, len(_T95)) - 1]
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))


def chosen(curves: Sequence[Curve], arm: str, learning_rate: float) -> list[Curve]:
    return [c for c in curves if c.arm == arm and c.learning_rate == learning_rate]


def learning_rates(curves: Sequence[Curve]) -> list[float]:
    return list(dict.fromkeys(c.learning_rate for c in curves))


def summarise(curves: Sequence[Curve]) -> dict[str, Mean]:
    """One method at one learning rate."""
    return {
        "reverse_kl": mean_of([c.reverse_kl[-1] for c in curves]),
        "forward_kl": mean_of([c.forward_kl[-1] for c in curves]),
        "total_variation": mean_of([c.total_variation[-1] for c in curves]),
        "gradient_norm": mean_of([statistics.fmean(c.gradient_norm[:FIRST_STEPS]) for c in curves]),
    }


def opening(setting: Setting, num_runs: int, log_ratio: float) -> str:
    return (
        f"{num_runs} runs of {setting.num_steps} steps: {len(ARMS)} methods, learning rates "
        f"{', '.join(f'{r:g}' for r in setting.learning_rates)}, {setting.num_seeds} seeds. At the start the teacher's "
        f"log-ratio falls to {log_ratio:.1f} at tokens that the student likes (probability 1 % or more)."
    )


def progress_line(curves: Sequence[Curve]) -> str:
    last = summarise(curves)
    told = "  ".join(f"{NAMES[name]} {last[name]}" for name in NAMES)
    return f"learning rate {curves[0].learning_rate:<5g} {curves[0].arm:<19} {told}"


def table(curves: Sequence[Curve]) -> Table:
    title = f"After the last step, and gradient norm over the first {FIRST_STEPS}: mean over seeds, 95 % interval"
    shown = Table(title=title, title_style="dim", title_justify="left", box=None, pad_edge=False)
    for name in ("rate", "method", "KL(S || T)", "KL(T || S)", "total var.", "gradient"):
        shown.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for rate in learning_rates(curves):
        for arm in ARMS:
            numbers = summarise(chosen(curves, arm, rate)).values()
            shown.add_row(f"{rate:g}", Text(arm), *map(str, numbers), end_section=arm == list(ARMS)[-1])
    return shown


def findings(curves: Sequence[Curve]) -> list[str]:
    """The results, in sentences."""
    said = [_compare(curves, rate) for rate in learning_rates(curves)]
    return ["What is seen:", *(f"- {line}" for line in [*said, *(_ranking(curves, name) for name in NAMES)])]


def _compare(curves: Sequence[Curve], rate: float) -> str:
    ours, plain = chosen(curves, "TrOPD", rate), chosen(curves, "OPD", rate)
    said = [f"{name} {_difference(ours, plain, field)}" for field, name in NAMES.items()]
    steps = ours[0].steps
    a, b = (_mean_curve(x, "reverse_kl") for x in (ours, plain))
    ahead = [step for step, x, y in zip(steps, a, b, strict=True) if y < x]
    text = f"learning rate {rate:g}, TrOPD against OPD: {', '.join(said)}."
    if ahead:
        until = "to the last step" if ahead[-1] == steps[-1] else f"until step {ahead[-1]}"
        text += f" OPD is ahead in KL(student || teacher) {until}"
        low = min(range(len(b)), key=b.__getitem__)
        text += f"; its lowest is {b[low]:.2g} at step {steps[low]}." if b[-1] > 1.1 * b[low] else "."
    return text


def _difference(ours: Sequence[Curve], plain: Sequence[Curve], field: str) -> str:
    """The difference seed by seed, since both start from the same pair."""
    gap = mean_of([getattr(x, field)[-1] - getattr(y, field)[-1] for x, y in zip(ours, plain, strict=True)])
    if math.isnan(gap.half_width):
        return f"differs by {gap.mean:.2g} (one seed: no interval)"
    if abs(gap.mean) <= gap.half_width:
        return f"cannot be told apart ({gap})"
    return f"is {'lower' if gap.mean < 0 else 'higher'} by {Mean(abs(gap.mean), gap.half_width)}"


def _mean_curve(curves: Sequence[Curve], field: str) -> list[float]:
    return [statistics.fmean(column) for column in zip(*(getattr(c, field) for c in curves), strict=True)]


def _ranking(curves: Sequence[Curve], field: str) -> str:
    best = []
    for arm in ARMS:
        last = {rate: summarise(chosen(curves, arm, rate))[field].mean for rate in learning_rates(curves)}
        rate = min(last, key=last.__getitem__)
        best.append((last[rate], f"{arm} {last[rate]:.2g} (at {rate:g})"))
    return f"{NAMES[field]}, each method at its best learning rate: {', '.join(text for _, text in sorted(best))}."


def write_results(output: Path, setting: Setting, curves: Sequence[Curve], log_ratio: float) -> Path:
    summary = [
        {"arm": arm, "learning_rate": rate}
        | {name: asdict(value) for name, value in summarise(chosen(curves, arm, rate)).items()}
        for rate in learning_rates(curves)
        for arm in ARMS
    ]
    results = {
        "setting": asdict(setting),
        "methods": {arm: repr(make(setting.top_k)) for arm, make in ARMS.items()},
        "versions": {"tropd": __version__, "torch": torch.__version__},
        "smallest_log_ratio": log_ratio,
        "summary": summary,
        "findings": findings(curves),
        "curves": [asdict(curve) for curve in curves],
    }
    path = output / "results.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path


def draw(output: Path, setting: Setting, curves: Sequence[Curve]) -> list[Path]:
    """Both divergences and the gradient norm over the steps, one column for each learning rate."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    rates = learning_rates(curves)
    # A fixed salt and no date: the same curves give the same file.
    with rc_context({"svg.hashsalt": "tropd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.2 * len(rates) + 0.6, 7.2), layout="constrained")
        axes = figure.subplots(3, len(rates), sharex=True, sharey="row", squeeze=False)
        for column, rate in enumerate(rates):
            axes[0, column].set_title(f"learning rate {rate:g}")
            axes[2, column].set_xlabel("step")
            for arm in ARMS:
                _draw_arm([axis[column] for axis in axes], chosen(curves, arm, rate), COLOURS.get(arm, "#777777"))
        for axis, label in zip(axes[:, 0], [*NAMES.values(), "gradient norm before clipping"], strict=True):
            axis.set_ylabel(label)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(ARMS), frameon=False)
        figure.suptitle(f"Exact tabular models: mean and range over {setting.num_seeds} seeds")
        paths = [output / "demo.svg", output / "demo.png"]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=150)
    return paths


def _draw_arm(axes: Sequence, curves: Sequence[Curve], colour: str) -> None:
    for axis, field in zip(axes, (*NAMES, "gradient_norm"), strict=True):
        steps = curves[0].steps if field in NAMES else range(len(curves[0].gradient_norm))
        values = list(zip(*(getattr(c, field) for c in curves), strict=True))
        axis.plot(steps, [statistics.fmean(v) for v in values], color=colour, label=curves[0].arm, linewidth=1.4)
        axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
        axis.set_yscale("log")


def markdown(curves: Sequence[Curve]) -> str:
    """Both divergences after the last step, as in docs/exact.md."""
    rates = learning_rates(curves)
    head = ["method", *(f"{name}, rate {rate:g}" for name in ("KL(S‖T)", "KL(T‖S)") for rate in rates)]
    rows = [
        [arm, *(str(summarise(chosen(curves, arm, rate))[field]) for field in NAMES for rate in rates)] for arm in ARMS
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])
