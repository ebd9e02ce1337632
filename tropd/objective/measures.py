"""Numbers per token that selectors look at, and the sequence arithmetic that they share.  No gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.objective.evidence import Needs, Tokens
from tropd.objective.terms import Context, Measure, Reach
from tropd.types import Author


@dataclass(frozen=True)
class StudentEntropy(Measure):
    own_needs = Needs.STUDENT_ENTROPY

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return tokens.student_entropy_N


@dataclass(frozen=True)
class ReverseKLAt(Measure):
    """KL(student || teacher) at the position, over the whole vocabulary."""

    own_needs = Needs.REVERSE_KL

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return tokens.reverse_kl_N


@dataclass(frozen=True)
class Normalised(Measure):
    """A measure brought to [0, 1] over the student's tokens of the whole batch, on all ranks.

    min_max   (x - min) / (max - min): one huge value squashes the rest
    rank      the share of tokens that score lower
    """

    measure: Measure
    by: Literal["min_max", "rank"] = "min_max"
    own_reach = Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        x_N = self.measure(tokens, context)
        everyone = context.world.gather(x_N[tokens.authors_N == Author.STUDENT])
        if everyone.numel() == 0:
            return torch.zeros_like(x_N)
        if self.by == "rank":
            lower_N = torch.searchsorted(everyone.sort().values, x_N.contiguous())
            return lower_N.to(x_N.dtype) / everyone.numel()
        low, high = everyone.min(), everyone.max()
        return ((x_N - low) / (high - low).clamp_min(torch.finfo(x_N.dtype).tiny)).clamp(0.0, 1.0)


@dataclass(frozen=True)
class EitherHigh(Measure):
    """a + b - a b: high where either is (TIP's soft OR)."""

    first: Measure
    second: Measure

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        a_N, b_N = self.first(tokens, context), self.second(tokens, context)
        return a_N + b_N - a_N * b_N


def group_ranks_of(score_N: Tensor, group_N: Tensor, member_N: Tensor) -> tuple[Tensor, Tensor]:
    """Per token: how many members of its group come before it when the highest score is first, and their number."""
    low = torch.where(member_N, score_N, torch.full_like(score_N, -torch.inf))
    order = torch.argsort(low, descending=True, stable=True)
    order = order[torch.argsort(group_N[order], stable=True)]
    sorted_group = group_N[order]
    start = torch.searchsorted(sorted_group, sorted_group)
    rank_N = torch.empty_like(group_N)
    rank_N[order] = torch.arange(len(order), device=order.device) - start
    num_groups = int(group_N.max()) + 1 if len(group_N) else 0
    size = torch.bincount(group_N[member_N], minlength=num_groups)
    return rank_N, size[group_N]


def padded(x_N: Tensor, tokens: Tokens) -> Tensor:
    """[S, T] with 0 where a sequence has no trained token: arithmetic along sequences, whatever the order of rows."""
    length = int(tokens.positions_N.max()) + 1 if len(tokens) else 0
    out = x_N.new_zeros((tokens.keys_S.shape[0], length))
    rows = (tokens.authors_N == Author.STUDENT) | (tokens.authors_N == Author.TEACHER)
    out[tokens.sequences_N[rows], tokens.positions_N[rows]] = x_N[rows]
    return out
