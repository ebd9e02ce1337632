"""False alarms: tokens of high loss after which both models agree again (TOPD's near future, arXiv 2606.00305)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count, PositiveShare
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens
from tropd.objective.measures import kth_highest, padded
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Measure, Selector
from tropd.types import Author


@dataclass(frozen=True)
class FutureGap(Measure):
    """mean |log pi_T - log pi_S| over the next `window` tokens of the response, or those that are left.

    It is inf at the last token, whose future nobody knows.

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -1.0, -1.0], teacher_logprobs_N=[-9.0, -2.0, -0.5])
    >>> FutureGap(window=2)(tokens, Context())
    tensor([0.7500, 0.5000,    inf])
    """

    window: Count = 20
    own_needs = Needs.SAMPLED
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        gap_N = tokens.log_ratio_N.abs()
        if len(tokens) == 0:
            return gap_N
        gap_ST, one_ST = padded(gap_N, tokens), padded(torch.ones_like(gap_N), tokens)
        total_ST, count_ST = torch.zeros_like(gap_ST), torch.zeros_like(gap_ST)
        for d in range(1, min(self.window, gap_ST.shape[1] - 1) + 1):
            total_ST[:, :-d] += gap_ST[:, d:]
            count_ST[:, :-d] += one_ST[:, d:]
        mean_ST = torch.where(count_ST > 0, total_ST / count_ST.clamp_min(1), torch.inf)
        return mean_ST[tokens.sequences_N, tokens.positions_N]


@dataclass(frozen=True)
class HighLoss(Selector):
    """1 on the `count` student's tokens of each response with the highest log pi_S - log pi_T, where it is above 0.

    They are chosen one after another, the highest first and the earliest of equals, each at least `separation` tokens
    from those before.

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -1.0, -1.0, -1.0], teacher_logprobs_N=[-6.0, -5.0, -0.5, -2.0])
    >>> HighLoss(count=3, separation=2)(tokens, Context())
    tensor([1., 0., 0., 1.])
    """

    count: Count = 50
    separation: Count = 8
    own_needs = Needs.SAMPLED
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        student_N = tokens.authors_N == Author.STUDENT
        loss_N = torch.where(student_N, -tokens.log_ratio_N, 0.0)
        if len(tokens) == 0:
            return loss_N
        loss_ST = padded(loss_N, tokens)
        chosen_ST = torch.zeros_like(loss_ST, dtype=torch.bool)
        places_T = torch.arange(loss_ST.shape[1], device=loss_ST.device)
        for _ in range(min(self.count, -(-loss_ST.shape[1] // self.separation))):
            best_S1 = loss_ST.argmax(1, keepdim=True)
            found_S1 = loss_ST.gather(1, best_S1) > 0
            chosen_ST |= (places_T == best_S1) & found_S1
            loss_ST = loss_ST.masked_fill((places_T - best_S1).abs() < self.separation, 0.0)
        return as_weight(chosen_ST[tokens.sequences_N, tokens.positions_N], loss_N)


@dataclass(frozen=True)
class FalseAlarm(Selector):
    """1 on the share `quiet` of a batch's high-loss tokens whose near future agrees best; ties at the cut count.

    The share is of the tokens of all ranks, rounded up.  A token without a future, or with an infinite gap in it, is no
    false alarm.  `strength` instead of 1 lowers a weight without taking it away: `~FalseAlarm(strength=0.5)`.

    >>> tokens = some_tokens(student_logprobs_N=[-1.0] * 4, teacher_logprobs_N=[-6.0, -1.0, -8.0, -4.0])
    >>> FalseAlarm(HighLoss(separation=2), FutureGap(window=1), quiet=0.5)(tokens, Context())
    tensor([1., 0., 0., 0.])
    """

    high: HighLoss = HighLoss()
    gap: FutureGap = FutureGap()
    quiet: PositiveShare = 0.3
    strength: PositiveShare = 1.0
    own_reach = Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        gap_N = self.gap(tokens, context)
        high_N = (self.high(tokens, context) > 0) & (gap_N < torch.inf)
        known = context.world.gather(-gap_N[high_N])
        if known.numel() == 0:
            return torch.zeros_like(gap_N)
        cut = kth_highest(known, torch.zeros_like(known, dtype=torch.int64), self.quiet)
        return self.strength * as_weight(high_N & (-gap_N >= cut), gap_N)
