"""Distributions made of those of several readers, at the same tokens of the same responses.

Log-probabilities come in by reader's name and go out; nothing here has a gradient or needs more than one tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import TYPE_CHECKING

from tropd.base.ranges import Finite, Ranged
from tropd.errors import ConfigError

if TYPE_CHECKING:  # which a run file does not need
    from torch import Tensor


_NOTHING = -1e4
"""As `tropd.objective.support.NOTHING`: so that a difference of two zeros is none."""


@dataclass(frozen=True, kw_only=True)
class Mixture(Ranged):
    """How to make one distribution of several."""

    @property
    def readers(self) -> tuple[str, ...]:
        """Of whom it is made, each once."""
        raise NotImplementedError

    def __call__(self, logprobs: Mapping[str, Tensor]) -> Tensor:
        """[C, V] from the same of each of `readers`."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Mean(Mixture):
    """log((1 / K) sum_k q_k): the mean of the probabilities.  Of one reader it is that reader."""

    of: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.of or len(set(self.of)) < len(self.of):
            raise ConfigError(f"the mean of the readers {list(self.of)} was asked for. Name one or more, each once.")

    @property
    def readers(self) -> tuple[str, ...]:
        return self.of

    def __str__(self) -> str:
        return f"the mean of {', '.join(self.of)}"

    def __call__(self, logprobs: Mapping[str, Tensor]) -> Tensor:
        if len(self.of) == 1:
            return logprobs[self.of[0]]
        return reduce(lambda a, b: a.logaddexp(b), (logprobs[name] for name in self.of)) - math.log(len(self.of))


@dataclass(frozen=True, kw_only=True)
class Steered(Mixture):
    """log softmax(log q_base + strength * (mean log q_plus - mean log q_minus)): what `plus` say more often than
    `minus` becomes likelier (OGLS-SD, arXiv 2605.12400).

    Logits in the place of log-probabilities give the same: they differ by a constant at each token, which the softmax
    takes out.  Strength 0 is the base to the last bit.  What the base never says stays unsaid; elsewhere a probability
    of 0 counts as exp(-10000), so that a token that all of `minus` rule out and none of `plus` gets all the mass.
    """

    base: str = "teacher"
    plus: tuple[str, ...]
    minus: tuple[str, ...]
    strength: Finite = 1.0
    """0 leaves the base as it is. Any finite number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.plus and self.minus):
            raise ConfigError(
                f"a reader steered from {list(self.minus)} to {list(self.plus)} was asked for. Name one reader or more "
                "in `plus` and in `minus`."
            )

    @property
    def readers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.base, *self.plus, *self.minus)))

    def __str__(self) -> str:
        return f"{self.base}, steered by {self.strength:g} from {', '.join(self.minus)} to {', '.join(self.plus)}"

    def __call__(self, logprobs: Mapping[str, Tensor]) -> Tensor:
        base = logprobs[self.base]
        if self.strength == 0:
            return base
        plus, minus = (
            reduce(add, (logprobs[name].clamp_min(_NOTHING) for name in names)) / len(names)
            for names in (self.plus, self.minus)
        )
        return (base + self.strength * (plus - minus)).log_softmax(-1)


def mixture_of(mean: tuple[str, ...] | None, steered: Steered | None) -> Mixture | None:
    """What a reader is made of by these two settings; None if it has a model."""
    if mean is not None and steered is not None:
        raise ConfigError("a reader is made by `mean` or by `steered`, not by both. Leave one out.")
    return steered if mean is None else Mean(of=mean)
