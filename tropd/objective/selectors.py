"""Which tokens a term counts, and how much: a weight >= 0 per token.

Selectors are evaluated once per batch, in the plan, and carry no gradient.  Each docstring has an example; paste it
after `from tropd.objective.examples import *`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from tropd.base.ranges import Finite, Positive, PositiveShare, Range, Share
from tropd.objective.context import Context, Reach
from tropd.objective.draws import uniform
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.measures import kth_highest, numbers_of
from tropd.objective.terms import Measure, Selector
from tropd.types import Author


def as_weight(mask_N: Tensor, like: Tensor) -> Tensor:
    return mask_N.to(like.dtype if like.is_floating_point() else torch.float32)


@dataclass(frozen=True)
class WrittenBy(Selector):
    """1 on the tokens that `author` wrote, 0 on the others.  STUDENT and TEACHER are the two in use.

    >>> tokens = some_tokens(authors_N=[Author.TEACHER, Author.STUDENT, Author.STUDENT])
    >>> STUDENT(tokens, Context())
    tensor([0., 1., 1.])
    """

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

    The ratio is that of planning time, so the region does not move while the student is trained on the batch.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-0.1, -3.0])
    >>> TrustRegion("soft")(tokens, Context())  # e^-2.5 = 0.08
    tensor([1.0000, 0.0821])
    >>> TrustRegion("threshold", tau=0.5)(tokens, Context())
    tensor([1., 0.])
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
    """1 where log pi_T - log pi_S of the written token is above `floor`, in nats (`inclusive`: at or above it).

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-1.0, -3.0])
    >>> LogRatioAbove(-2.0)(tokens, Context())
    tensor([1., 0.])
    """

    floor: Annotated[float, Range(unbounded=True)]
    inclusive: bool = False
    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        ratio_N = tokens.log_ratio_N
        return as_weight(ratio_N >= self.floor if self.inclusive else ratio_N > self.floor, ratio_N)


@dataclass(frozen=True)
class ProbabilityGapAbove(Selector):
    """1 where pi_T - pi_S of the written token is above `tau` (AOPD's gate, arXiv 2605.06387).

    >>> tokens = some_tokens(student_logprobs_N=[-2.0, -0.5], teacher_logprobs_N=[-1.0, -3.0])
    >>> ProbabilityGapAbove(0.1)(tokens, Context())  # e^-1 - e^-2 = 0.23
    tensor([1., 0.])
    """

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
    """1 where the entropy of the teacher's next-token distribution is above `nats`.

    >>> TeacherEntropyAbove(0.8)(some_tokens(teacher_entropy_N=[0.1, 1.5]), Context())
    tensor([0., 1.])
    """

    nats: Finite
    own_needs = Needs.TEACHER_ENTROPY

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.teacher_entropy_N > self.nats, tokens.teacher_entropy_N)


@dataclass(frozen=True)
class TopFraction(Selector):
    """1 on the `fraction` of the student's tokens with the highest score, rounded up; ties at the cut are kept.

    `scope` "batch" compares all tokens of the batch on all ranks, "sequence" those of each sequence.  A micro-batch is
    never cut alone: the top 20 % of one token is that token.  Only scores above `least` are kept, if it is given.

    >>> tokens = some_tokens(student_entropy_N=[0.1, 2.0, 0.7, 1.2])
    >>> TopFraction(StudentEntropy(), 0.5)(tokens, Context())
    tensor([0., 1., 0., 1.])
    """

    score: Measure
    fraction: PositiveShare
    scope: Literal["batch", "sequence"] = "batch"
    least: Finite | None = None

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
        kept_N = (score_N >= cut_G[group_N.clamp(max=len(cut_G) - 1)]) & member_N
        return as_weight(kept_N if self.least is None else kept_N & (score_N > self.least), score_N)


@dataclass(frozen=True)
class PerplexityWeight(Selector):
    """A weight per sequence, proportional to perplexity^(1 / temperature) within its group (SCOPE).

    The weights of a group sum to the number of its sequences, so their mean is 1.  `who` names the model whose
    perplexity counts, over the tokens that the student wrote.  `sign` +1 favours surprising sequences, -1 likely ones.
    Sequences without a token in `among` get 0 and do not count.

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -1.0, -2.0], sequences_N=[0, 0, 1], groups_S=[0, 0])
    >>> PerplexityWeight("student", sign=1, among=STUDENT)(tokens, Context())  # e^1 against e^2
    tensor([0.5379, 0.5379, 1.4621])
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
    """`early` until the share `switch` of training is over, then `late`.

    >>> curriculum = FromProgress(STUDENT, ~STUDENT, switch=0.5)
    >>> tokens = some_tokens(authors_N=[Author.STUDENT, Author.TEACHER])
    >>> curriculum(tokens, Context(progress=0.2)), curriculum(tokens, Context(progress=0.7))
    (tensor([1., 0.]), tensor([0., 1.]))
    """

    early: Selector
    late: Selector
    switch: Share

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return (self.early if context.progress < self.switch else self.late)(tokens, context)


@dataclass(frozen=True)
class Verified(Selector):
    """1 on the tokens of sequences whose reward from the grader is above `above`.

    >>> tokens = some_tokens(token_ids_N=[5, 6, 7], sequences_N=[0, 0, 1], rewards_S=[1.0, 0.0])
    >>> Verified()(tokens, Context())
    tensor([1., 1., 0.])
    """

    above: Finite = 0.0
    own_needs = Needs.REWARD

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.rewards_S[tokens.sequences_N] > self.above, tokens.rewards_S)


@dataclass(frozen=True)
class Everywhere(Selector):
    """1 on every token.

    >>> Everywhere()(some_tokens(token_ids_N=[5, 6, 7]), Context())
    tensor([1., 1., 1.])
    """

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return torch.ones(len(tokens), device=tokens.token_ids_N.device)
