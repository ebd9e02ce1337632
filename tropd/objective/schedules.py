"""Numbers that change with training progress u in [0, 1]."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Finite, PositiveShare, Ranged

Shape = Literal["constant", "linear", "cosine", "convex", "switch"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(Ranged):
    """From `start` to `end` while progress goes from 0 to `until`, then `end`.

        constant   `start` throughout
        cosine     half a cosine: slow, fast, slow
        convex     a quarter sine: fast, then slow (the curve drawn in TrOPD's figure 2)
        switch     `start` until `until`, then `end`

    >>> fade = Schedule(shape="linear", start=0.4, end=0.0, until=0.5)
    >>> fade(0.0), fade(0.25), fade(0.8)
    (0.4, 0.2, 0.0)
    """

    shape: Shape = "constant"
    start: Finite = 1.0
    """Any finite number."""
    end: Finite = 0.0
    """Any finite number."""
    until: PositiveShare = 1.0
    """Share of training after which the schedule stays at `end`. In (0, 1]."""

    def __call__(self, progress: float) -> float:
        u = min(max(progress / self.until, 0.0), 1.0)
        if self.shape == "constant":
            return self.start
        left = {
            "linear": 1.0 - u,
            "cosine": 0.5 * (1.0 + math.cos(math.pi * u)),
            "convex": 1.0 - math.sin(0.5 * math.pi * u),
            "switch": float(u < 1.0),
        }[self.shape]
        return self.end + (self.start - self.end) * left

    def __str__(self) -> str:
        if self.shape == "constant":
            return f"{self.start:g}"
        stop = f" by {self.until:g}" if self.until < 1 else ""
        return f"{self.shape} {self.start:g} -> {self.end:g}{stop}"
