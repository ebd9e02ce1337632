"""Numbers per token that selectors look at, and the sequence arithmetic that they share.  No gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens, trained
from tropd.objective.terms import Measure
from tropd.types import Author


@dataclass(frozen=True)
class StudentEntropy(Measure):
    """The entropy of the student's next-token distribution, in nats.

    >>> StudentEntropy()(some_tokens(student_entropy_N=[0.1, 1.5]), Context())
    tensor([0.1000, 1.5000])
    """

    own_needs = Needs.STUDENT_ENTROPY

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return tokens.student_entropy_N


@dataclass(frozen=True)
class ReverseKLAt(Measure):
    """KL(student || teacher) of the next-token distributions at the position, over the whole vocabulary, in nats.

    >>> ReverseKLAt()(some_tokens(reverse_kl_N=[0.02, 0.9]), Context())
    tensor([0.0200, 0.9000])
    """

    own_needs = Needs.REVERSE_KL

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return tokens.reverse_kl_N


@dataclass(frozen=True)
class Normalised(Measure):
    """A measure scaled to [0, 1] over the student's tokens of the whole batch, on all ranks.

        min_max   (x - min) / (max - min) of the finite values, 1 or 0 for an infinite one; a single huge value makes
              all others small
        rank      the share of tokens that score lower
        robust    (x - Q05) / (Q95 - Q05) of the finite values' quantiles, cut to [0, 1]; where both are the same, 1 at
              or above them.  0 stays 0 where no value is negative

    >>> tokens = some_tokens(student_entropy_N=[0.0, 1.0, 0.5, 2.0])
    >>> Normalised(StudentEntropy())(tokens, Context())
    tensor([0.0000, 0.5000, 0.2500, 1.0000])
    >>> Normalised(StudentEntropy(), by="rank")(tokens, Context())
    tensor([0.0000, 0.5000, 0.2500, 0.7500])
    """

    measure: Measure
    by: Literal["min_max", "rank", "robust"] = "min_max"
    own_reach = Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        x_N = numbers_of(self.measure, tokens, context, member_N)
        everyone = context.world.gather(x_N[member_N])
        if everyone.numel() == 0:
            return torch.zeros_like(x_N)
        if self.by == "rank":
            lower_N = torch.searchsorted(everyone.sort().values, x_N.contiguous())
            return lower_N.to(x_N.dtype) / everyone.numel()
        finite = everyone[everyone.isfinite()]
        low, high = finite.aminmax() if len(finite) else (x_N.new_zeros(()),) * 2
        if self.by == "robust":
            low, high = (quantile(finite, share) if len(finite) else low for share in (0.05, 0.95))
            if low == high:
                return ((x_N >= high) & (x_N != 0)).to(x_N.dtype)
        return ((x_N - low) / (high - low).clamp_min(torch.finfo(x_N.dtype).tiny)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class EitherHigh(Measure):
    """a + b - a b: high where one of two measures in [0, 1] is (TIP's soft OR).

    >>> tokens = some_tokens(student_entropy_N=[0.0, 0.5, 1.0], reverse_kl_N=[0.0, 0.5, 0.0])
    >>> EitherHigh(StudentEntropy(), ReverseKLAt())(tokens, Context())
    tensor([0.0000, 0.7500, 1.0000])
    """

    first: Measure
    second: Measure

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        a_N, b_N = self.first(tokens, context), self.second(tokens, context)
        return a_N + b_N - a_N * b_N


def numbers_of(measure: Measure, tokens: Tokens, context: Context, member_N: Tensor) -> Tensor:
    """A measure on the members, 0 elsewhere; NaN is refused, because it would win or lose every comparison."""
    x_N = measure(tokens, context)
    x_N = torch.where(member_N, x_N, torch.zeros_like(x_N))
    if bool(torch.isnan(x_N).any()):
        raise EvidenceError(
            f"the measure {measure} is NaN on {int(torch.isnan(x_N).sum())} tokens, so tokens cannot be chosen by it. "
            "Look at the log-probabilities that it is made from."
        )
    return x_N


def kth_highest(score_M: Tensor, group_M: Tensor, fraction: float) -> Tensor:
    """By group 0, 1, ...: the lowest score among the `fraction` of its members, rounded up, that score highest."""
    order = torch.argsort(score_M, descending=True, stable=True)
    order = order[torch.argsort(group_M[order], stable=True)]
    size = torch.bincount(group_M)
    numbers = [max(1, math.ceil(fraction * n - 1e-9)) for n in size.tolist()]  # .07 of 100 is 7.000000000000001
    kept = torch.tensor(numbers, device=size.device)
    last = (size.cumsum(0) - size + kept - 1).clamp(max=max(len(order) - 1, 0))
    return score_M[order][last]


def quantile(x_M: Tensor, share: float) -> Tensor:
    """The number that a share of the numbers lies below, interpolated; as many numbers as there are."""
    place = share * (len(x_M) - 1)
    low, high = x_M.sort().values[[math.floor(place), math.ceil(place)]]
    return torch.lerp(low, high, place - math.floor(place))


def padded(x_N: Tensor, tokens: Tokens) -> Tensor:
    """[S, T] with 0 where a sequence has no trained token: arithmetic along sequences, whatever the order of rows."""
    length = int(tokens.positions_N.max()) + 1 if len(tokens) else 0
    out = x_N.new_zeros((tokens.keys_S.shape[0], length))
    rows = trained(tokens)
    out[tokens.sequences_N[rows], tokens.positions_N[rows]] = x_N[rows]
    return out
