"""Which distribution to imitate: transformations of the teacher's whole distribution.  No gradient."""

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
    """T^(1 / temperature), normalised: above 1 the target is flatter than the teacher, below 1 sharper.

    >>> log_t = torch.tensor([[0.8, 0.2]]).log()
    >>> Temperature(2.0)(log_t, log_t).exp()
    tensor([[0.6667, 0.3333]])
    """

    temperature: Positive

    def __call__(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        return (log_t / self.temperature).log_softmax(-1)


@dataclass(frozen=True)
class GeometricBridge(Target):
    """T^(1 - share) S^share, normalised: a target between teacher and student (Veto).

    >>> log_t, log_s = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.2, 0.8]]).log()
    >>> GeometricBridge(0.5)(log_t, log_s).exp()
    tensor([[0.5000, 0.5000]])
    """

    share: Share

    def __call__(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        if self.share in (0.0, 1.0):  # 0 * log 0 is NaN
            return log_s if self.share else log_t
        return ((1.0 - self.share) * log_t + self.share * log_s).log_softmax(-1)
