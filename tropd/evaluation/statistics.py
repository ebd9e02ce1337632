"""How sure a score is: pass@k without bias, intervals over prompts, comparisons of two models.

The unit of chance is the item (the prompt).  Samples of one prompt are not independent, so intervals resample items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from tropd.errors import ConfigError, DataError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The chance that k of the n samples, drawn without replacement, hold a correct one (Chen et al. 2021, eq. 1).

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n-c+1 .. n} (1 - k / i)
    """
    if not 0 <= num_correct <= num_samples:
        raise ConfigError(
            f"pass@k was asked of {num_correct} correct samples out of {num_samples}. Give 0 <= correct <= samples."
        )
    if not 1 <= k <= num_samples:
        raise ConfigError(f"pass@{k} was asked, but there are {num_samples} samples. Take at least k samples, k >= 1.")
    if num_samples - num_correct < k:
        return 1.0
    i = np.arange(num_samples - num_correct + 1, num_samples + 1, dtype=np.float64)
    return float(1.0 - np.prod(1.0 - k / i))


def bootstrap_interval(
    values_per_item: Sequence[float], *, level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean when items are drawn again with replacement (Efron 1979).

    Equal values give an interval of zero width: ten right answers out of ten do not prove a score of 1.
    """
    values = _finite(values_per_item, "values_per_item")
    if not 0.0 < level < 1.0:
        raise ConfigError(f"an interval of level {level} was asked. Give a level between 0 and 1, such as 0.95.")
    if num_resamples < 1:
        raise ConfigError(f"{num_resamples} resamples were asked. Give at least 1; 2000 is usual.")
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much better one model is than another on the same items."""

    mean: float
    low: float
    high: float
    num_items: int

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0.0 or self.high < 0.0


def paired_difference(
    values_per_item: Sequence[float],
    baseline_per_item: Sequence[float],
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """mean(values - baseline) with its interval; the pairing removes what makes one prompt harder than another."""
    values, baseline = _finite(values_per_item, "values_per_item"), _finite(baseline_per_item, "baseline_per_item")
    if len(values) != len(baseline):
        raise DataError(
            f"a paired difference was asked of {len(values)} and {len(baseline)} items. Give both models the same "
            "items in order."
        )
    gain = values - baseline
    low, high = bootstrap_interval(gain.tolist(), level=level, num_resamples=num_resamples, seed=seed)
    return Difference(mean=float(gain.mean()), low=low, high=high, num_items=len(gain))


def probability_of_improvement(scores: Sequence[Sequence[float]], baseline: Sequence[Sequence[float]]) -> float:
    """The chance that a run beats a baseline's run on a task drawn at random (Agarwal et al. 2021, section 4.3).

    P = mean over tasks m of  mean over runs i, j of  [x_mi > y_mj] + [x_mi = y_mj] / 2
    """
    if len(scores) != len(baseline) or not scores:
        raise DataError(
            f"a probability of improvement was asked of scores of {len(scores)} tasks against {len(baseline)}. Give "
            "both the same tasks, at least one."
        )
    wins = []
    for x, y in zip(scores, baseline, strict=True):
        gap_ij = _finite(x, "scores")[:, None] - _finite(y, "baseline")[None, :]
        wins.append(((np.sign(gap_ij) + 1.0) / 2.0).mean())
    return float(np.mean(wins))


def _finite(values: Sequence[float], name: str) -> np.ndarray:
    if len(values) == 0:
        raise DataError(f"`{name}` is empty. Give at least one number.")
    bad = [i for i, value in enumerate(values) if not isfinite(value)]
    if bad:
        raise DataError(f"`{name}` holds {values[bad[0]]} at item {bad[0]} ({len(bad)} such). Give finite numbers.")
    return np.asarray(values, dtype=np.float64)
