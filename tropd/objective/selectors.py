"""Which tokens, how much.  Evaluated once per batch, in the plan; no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from tropd.base.ranges import Finite, Positive, PositiveShare, Range, Share, Whole
from tropd.objective.draws import uniform
from tropd.objective.evidence import Needs, Tokens, at_least_float32, trained
from tropd.objective.measures import kth_highest, numbers_of
from tropd.objective.terms import Context, Measure, Reach, Selector
from tropd.types import Author


def as_weight(mask_N: Tensor, like: Tensor) -> Tensor:
    return mask_N.to(like.dtype if like.is_floating_point() else torch.float32)


@dataclass(frozen=True)
class WrittenBy(Selector):
    author: Author

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.authors_N == self.author, tokens.token_ids_N)

    def __str__(self) -> str:
        return self.author.name.lower()


STUDENT, TEACHER = WrittenBy(Author.STUDENT), WrittenBy(Author.TEACHER)

Trust = Literal["bernoulli", "threshold", "soft"]


@dataclass(frozen=True)
class TrustRegion(Selector):
    """Where the teacher plausibly agrees with a token that the student wrote (TrOPD, arXiv 2606.01249).

        agreement = min(pi_T(x) / pi_S(x), 1)
        bernoulli   1 with probability `agreement`: the paper's M_x.  E[1 - M] = total variation at the position
        threshold   1 where agreement >= tau
        soft        the agreement itself: same expectation as bernoulli, no draw

    Gradient: none; the student is the one of planning time, so the region stays put while it is trained on.
    """

    rule: Trust = "bernoulli"
    tau: PositiveShare = 1.0
    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        log_agreement_N = tokens.log_ratio_N.clamp(max=0.0)
        if self.rule == "soft":
            return log_agreement_N.exp()
        if self.rule == "threshold":
            return as_weight(log_agreement_N >= math.log(self.tau), log_agreement_N)
        draws_N = uniform(tokens.keys_S[tokens.sequences_N], tokens.positions_N).to(log_agreement_N.device)
        return as_weight(draws_N < log_agreement_N.exp(), log_agreement_N)


@dataclass(frozen=True)
class LogRatioAbove(Selector):
    """1 where log pi_T - log pi_S > floor (`inclusive`: >=)."""

    floor: Annotated[float, Range(unbounded=True)]
    inclusive: bool = False
    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        ratio_N = tokens.log_ratio_N
        return as_weight(ratio_N >= self.floor if self.inclusive else ratio_N > self.floor, ratio_N)


@dataclass(frozen=True)
class ProbabilityGapAbove(Selector):
    """1 where pi_T - pi_S > tau (AOPD's gate, arXiv 2605.06387)."""

    tau: Annotated[float, Range(at_least=-1, at_most=1)] = 0.0
    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        # The sign is taken in log space: exp rounds small gaps to nothing.
        if self.tau == 0.0:
            return as_weight(tokens.log_ratio_N > 0.0, tokens.log_ratio_N)
        gap_N = tokens.teacher_logprobs_N.exp() - tokens.student_logprobs_N.exp()
        return as_weight(gap_N > self.tau, gap_N)


@dataclass(frozen=True)
class TeacherEntropyAbove(Selector):
    """1 where the teacher's next-token entropy exceeds a number of nats."""

    nats: Finite
    own_needs = Needs.TEACHER_ENTROPY

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.teacher_entropy_N > self.nats, tokens.teacher_entropy_N)


@dataclass(frozen=True)
class TopFraction(Selector):
    """1 on the `fraction` of the student's tokens that score highest, rounded up; ties at the cut are kept.

    The cut is taken over the whole batch of all ranks, or within each sequence: never within a micro-batch, where the
    top 20 % of one token is that token.
    """

    score: Measure
    fraction: PositiveShare
    scope: Literal["batch", "sequence"] = "batch"

    @property
    def reach(self) -> Reach:
        return max(self.score.reach, Reach.BATCH if self.scope == "batch" else Reach.SEQUENCE)

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        score_N = numbers_of(self.score, tokens, context, member_N)
        group_N = tokens.sequences_N if self.scope == "sequence" else torch.zeros_like(tokens.sequences_N)
        scores, groups = score_N[member_N], group_N[member_N]
        if self.scope == "batch":
            scores, groups = context.world.gather(scores), context.world.gather(groups)
        if scores.numel() == 0:
            return torch.zeros_like(score_N)
        cut_G = kth_highest(scores, groups, self.fraction)
        return as_weight((score_N >= cut_G[group_N.clamp(max=len(cut_G) - 1)]) & member_N, score_N)


@dataclass(frozen=True)
class TokenIn(Selector):
    """1 where the written token is one of `ids` (special-token masking: `~TokenIn(...)`)."""

    ids: tuple[Whole, ...]

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        ids = torch.tensor(self.ids, dtype=tokens.token_ids_N.dtype, device=tokens.token_ids_N.device)
        return as_weight(torch.isin(tokens.token_ids_N, ids), tokens.token_ids_N)


@dataclass(frozen=True)
class FirstOf(Selector):
    """1 where a response holds one of these ids for the first time, each id by itself; only the student's count."""

    ids: tuple[Whole, ...]
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        first_N = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.token_ids_N.device)
        for token_id in self.ids:
            here_N = (tokens.token_ids_N == token_id) & (tokens.authors_N == Author.STUDENT)
            place_N = torch.where(here_N, tokens.num_before_N, torch.iinfo(tokens.num_before_N.dtype).max)
            earliest_S = place_N.new_full((len(tokens.keys_S),), torch.iinfo(place_N.dtype).max)
            earliest_S.scatter_reduce_(0, tokens.sequences_N, place_N, "amin")
            first_N |= here_N & (place_N == earliest_S[tokens.sequences_N])
        return as_weight(first_N, tokens.token_ids_N)


@dataclass(frozen=True)
class PositionBelow(Selector):
    """1 on the first `limit` tokens of each response, counting those of the token's own author only.

    Neither a teacher's prefix nor a tool's answer takes the place of a token that the student wrote.
    """

    limit: Whole

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight((tokens.num_before_N < self.limit) & trained(tokens), tokens.num_before_N)


@dataclass(frozen=True)
class LastPositions(Selector):
    """1 on the last `count` tokens of each response, counting those of the token's own author only."""

    count: Whole

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight((tokens.num_after_N < self.count) & trained(tokens), tokens.num_after_N)


@dataclass(frozen=True)
class PerplexityWeight(Selector):
    """Weights of the sequences of a group by perplexity^(1 / temperature), summing to their number (SCOPE).

    The perplexity is that of the student's tokens; a prefix that the teacher wrote takes no part in it.

    `who` is the model whose perplexity counts; `sign` +1 favours the surprising sequences, -1 the likely ones; only
    sequences that `among` selects take part.
    """

    who: Literal["student", "teacher"]
    sign: Literal[1, -1]
    among: Selector
    temperature: Positive = 1.0
    own_needs = Needs.SAMPLED
    own_reach = Reach.GROUP

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        logprobs_N = tokens.student_logprobs_N if self.who == "student" else tokens.teacher_logprobs_N
        logprobs_N = at_least_float32(logprobs_N)
        member_N = (self.among(tokens, context) * (tokens.authors_N == Author.STUDENT)).to(logprobs_N.dtype)
        surprise_N = torch.where(member_N > 0, -logprobs_N * member_N, 0.0)
        num_S = logprobs_N.new_zeros(len(tokens.keys_S)).index_add_(0, tokens.sequences_N, member_N)
        mean_S = torch.zeros_like(num_S).index_add_(0, tokens.sequences_N, surprise_N) / num_S.clamp_min(1e-30)
        score_S = (self.sign * mean_S / self.temperature).clamp(-1e30, 1e30)  # a perplexity may be infinite
        score_S = score_S.masked_fill(num_S == 0, -torch.inf)
        groups, scores = context.world.gather(tokens.groups_S), context.world.gather(score_S)
        names, index = torch.unique(groups, return_inverse=True)
        slot_S = torch.searchsorted(names, tokens.groups_S)
        peak = scores.new_full((len(names),), -torch.inf).scatter_reduce(0, index, scores, "amax").clamp_min(-1e30)
        share = (scores - peak[index]).exp()
        total = scores.new_zeros(len(names)).index_add_(0, index, share).clamp_min(torch.finfo(scores.dtype).tiny)
        count = scores.new_zeros(len(names)).index_add_(0, index, (scores > -torch.inf).to(scores.dtype))
        weight_S = (score_S - peak[slot_S]).exp() / total[slot_S] * count[slot_S]
        return weight_S[tokens.sequences_N] * member_N


@dataclass(frozen=True)
class FromProgress(Selector):
    """`early` until `switch` of training is over, then `late`."""

    early: Selector
    late: Selector
    switch: Share

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return (self.early if context.progress < self.switch else self.late)(tokens, context)


@dataclass(frozen=True)
class Verified(Selector):
    """1 on sequences that the grader passes (reward > `above`)."""

    above: Finite = 0.0
    own_needs = Needs.REWARD

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.rewards_S[tokens.sequences_N] > self.above, tokens.rewards_S)


@dataclass(frozen=True)
class Everywhere(Selector):
    """1."""

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return torch.ones(len(tokens), device=tokens.token_ids_N.device)
