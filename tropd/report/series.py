"""Columns cut down to what a chart can show.  Extremes always stay, so no spike is ever lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np


def keep_extremes(columns: Sequence[np.ndarray], limit: int) -> np.ndarray:
    """Which entries to show: all if they are few, else each bucket's least and largest of each column, and both ends.

    Numbers that are not finite are kept as well, one for each bucket and column.
    """
    size = len(columns[0]) if columns else 0
    if size <= limit:
        return np.arange(size)
    per_bucket = 2 * len(columns)
    num_buckets = max(limit // per_bucket, 1)
    edges = np.linspace(0, size, num_buckets + 1).astype(int)
    chosen = {0, size - 1}
    for column in columns:
        low_N, high_N = (np.where(np.isfinite(column), column, fill) for fill in (np.inf, -np.inf))
        broken_N = ~np.isfinite(column)
        for begin, end in pairwise(edges.tolist()):
            chosen |= {begin + int(low_N[begin:end].argmin()), begin + int(high_N[begin:end].argmax())}
            if broken_N[begin:end].any() and not broken_N[begin:end].all():
                chosen.add(begin + int(broken_N[begin:end].argmax()))
    return np.asarray(sorted(chosen))


def pack(steps: Sequence[int], columns: Mapping[str, np.ndarray], limit: int, *, gaps: bool = True) -> dict[str, Any]:
    """{"x": [...], "y": {name: [...]}}; null where there is no finite number and, with `gaps`, between steps that are
    not there."""
    steps_N = np.asarray(steps, dtype=np.int64)
    index = keep_extremes(list(columns.values()), limit)
    x, missing = steps_N[index], np.array([], dtype=int)
    if gaps and len(index):
        follows = np.diff(steps_N) == 1
        broken = np.concatenate([[0], np.cumsum(~follows)])  # steps that are missing in the records up to here
        missing = np.nonzero(np.diff(broken[index]) > 0)[0] + 1
    packed_x = np.insert(x.astype(float), missing, [(x[i - 1] + x[i]) / 2 for i in missing]) if len(missing) else x
    packed = {"x": [int(v) if v == int(v) else float(v) for v in packed_x.tolist()], "y": {}}
    for name, column in columns.items():
        values = column[index]
        packed["y"][name] = shorten(np.insert(values, missing, np.nan) if len(missing) else values)
    return packed


def shorten(values: np.ndarray) -> list[float | None]:
    """Five significant digits; None for what is not finite."""
    return [float(f"{v:.5g}") if np.isfinite(v) else None for v in values.tolist()]


def average(column: np.ndarray, num_buckets: int) -> np.ndarray:
    """Means over equal parts, NaN where a part holds no finite number."""
    if len(column) <= num_buckets:
        return column
    edges = np.linspace(0, len(column), num_buckets + 1).astype(int)
    finite = np.isfinite(column)
    sums = np.add.reduceat(np.where(finite, column, 0.0), edges[:-1])
    counts = np.add.reduceat(finite.astype(float), edges[:-1])
    return np.divide(sums, counts, out=np.full(num_buckets, np.nan), where=counts > 0)
