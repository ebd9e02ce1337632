"""Whom to imitate exactly: transformations of the teacher's whole distribution.  No gradient."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropd.base.ranges import Positive, Share
from tropd.objective.terms import Piece


class Target(Piece):
    """(log T, log S without gradient) -> log of the distribution to imitate."""

    def __call__(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Temperature(Target):
    """T^(1 / temperature), normalised."""

    temperature: Positive

    def __call__(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        return (log_t / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class GeometricBridge(Target):
    """T^(1 - a) S^a, normalised: a target between the two (Veto)."""

    share: Share

    def __call__(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        if self.share in (0.0, 1.0):  # 0 * log 0 is NaN
            return log_s if self.share else log_t
        return ((1.0 - self.share) * log_t + self.share * log_s).log_softmax(-1)
