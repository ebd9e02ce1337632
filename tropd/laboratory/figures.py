"""Learning curves: every method at its best learning rate, mean over seeds and their range."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from tropd.laboratory.lab import Lab, file_name
from tropd.laboratory.tables import Arm, arms_of
from tropd.laboratory.trial import Outcome

# Okabe and Ito's colours, told apart by everyone; line styles repeat the distinction.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
_STYLES = ("-", "--", ":", "-.")


def draw(lab: Lab, outcomes: Sequence[Outcome], directory: Path) -> list[Path]:
    """One figure for each testbed: accuracy and gradient norm over the steps."""
    import matplotlib

    matplotlib.use("Agg")
    written = []
    for testbed, budget in product(lab.testbeds, lab.budgets or ("",)):
        if arms := arms_of(lab, outcomes, testbed, budget):
            name = Path(testbed).stem if testbed.endswith(".toml") else testbed
            name += f", equal {budget}" if budget else ""
            written.append(_draw_one(name, arms, directory / f"curves-{file_name(name)}.svg"))
    return written


def _draw_one(testbed: str, arms: Sequence[Arm], path: Path) -> Path:
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "tropd"  # the same curves make the same file
    figure, (scores, norms) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for number, arm in enumerate(arms):
        look = {"color": _COLOURS[number % len(_COLOURS)], "linestyle": _STYLES[number // len(_COLOURS) % len(_STYLES)]}
        done = [o for o in arm.best if o.status == "done"]
        if not done:
            continue
        by_step = list(zip(*(o.scores for o in done), strict=True))
        scores.plot(done[0].steps, [statistics.fmean(s) for s in by_step], label=arm.method, **look)
        scores.fill_between(done[0].steps, [min(s) for s in by_step], [max(s) for s in by_step], alpha=0.1, **look)
        norm = [statistics.fmean(n) for n in zip(*(o.gradient_norm for o in done), strict=True)]
        norms.plot(range(1, len(norm) + 1), norm, **look)
    scores.set(title=f"{testbed}: held-out accuracy", xlabel="step", ylim=(0, 1))
    norms.set(title="gradient norm before clipping", xlabel="step", yscale="log")
    for axis in (scores, norms):
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path
