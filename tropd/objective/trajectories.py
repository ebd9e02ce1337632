"""Selectors that choose whole responses, or weigh tokens by how sure both models are within one.

Their statistics are those of the whole batch on all ranks, or of one response; never of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.base.ranges import NotNegative, PositiveShare
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.measures import kth_highest, numbers_of
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Measure, Selector
from tropd.types import Author


@dataclass(frozen=True)
class TeacherLogprob(Measure):
    """log pi_T of the written token.

    >>> TeacherLogprob()(some_tokens(teacher_logprobs_N=[-0.5, -3.0]), Context())
    tensor([-0.5000, -3.0000])
    """

    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return at_least_float32(tokens.teacher_logprobs_N)


@dataclass(frozen=True)
class BestResponses(Selector):
    """1 on the student's tokens of the `share` of the batch's responses, rounded up, whose mean score is highest.

    The mean is over what the student wrote, and responses in which it wrote nothing do not count.  Ties at the cut are
    kept.

    >>> tokens = some_tokens(teacher_logprobs_N=[-1.0, -3.0, -1.5], sequences_N=[0, 0, 1])
    >>> BestResponses(TeacherLogprob(), 0.5)(tokens, Context())  # means -2 and -1.5
    tensor([0., 0., 1.])
    """

    score: Measure
    share: PositiveShare
    own_reach = Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        score_N = numbers_of(self.score, tokens, context, member_N)
        total_S, num_S = _sums(torch.stack([score_N.double(), member_N.double()], 1), tokens).unbind(1)
        mean_S, member_S = total_S / num_S.clamp_min(1.0), num_S > 0
        everyone = context.world.gather(mean_S[member_S])
        if len(everyone) == 0:
            return torch.zeros_like(score_N)
        cut = kth_highest(everyone, torch.zeros_like(everyone, dtype=torch.int64), self.share)
        best_S = member_S & (mean_S >= cut)
        return as_weight(best_S[tokens.sequences_N] & member_N, score_N)


@dataclass(frozen=True)
class EntropyWeight(Selector):
    """(1 + sure (1 - H_T / max H_T)) (1 + unsure H_S / max H_S) of the student's tokens, divided by its mean (FiRe-OPD,
    arXiv 2606.02684): most where the teacher is sure and the student is not.

    Maxima and mean are those of what the student wrote of each sequence, or of the whole batch.

    >>> tokens = some_tokens(teacher_entropy_N=[0.0, 1.0], student_entropy_N=[2.0, 1.0])
    >>> EntropyWeight()(tokens, Context())  # 2 * 2 against 1 * 1.5
    tensor([1.4545, 0.5455])
    """

    sure: NotNegative = 1.0
    """How much a sure teacher counts. At least 0."""
    unsure: NotNegative = 1.0
    """How much an unsure student counts. At least 0."""
    scope: Literal["sequence", "batch"] = "sequence"
    own_needs = Needs.TEACHER_ENTROPY | Needs.STUDENT_ENTROPY

    @property
    def reach(self) -> Reach:
        return Reach.SEQUENCE if self.scope == "sequence" else Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        entropies_N2 = torch.stack([tokens.teacher_entropy_N, tokens.student_entropy_N], 1)
        entropies_N2 = torch.where(member_N[:, None], at_least_float32(entropies_N2), 0.0)
        index_N2 = tokens.sequences_N[:, None].expand(-1, 2)
        peak_S2 = entropies_N2.new_zeros(len(tokens.keys_S), 2).scatter_reduce(0, index_N2, entropies_N2, "amax")
        if self.scope == "batch" and len(everyone := context.world.gather(peak_S2)):
            peak_S2 = everyone.amax(0).expand_as(peak_S2)
        tiny = torch.finfo(peak_S2.dtype).tiny  # a model that is sure everywhere has only zeros
        teacher_N, student_N = (entropies_N2 / peak_S2.clamp_min(tiny)[tokens.sequences_N]).clamp(0.0, 1.0).unbind(1)
        weight_N = (1.0 + self.sure * (1.0 - teacher_N)) * (1.0 + self.unsure * student_N) * member_N
        sums_S2 = _sums(torch.stack([weight_N.double(), member_N.double()], 1), tokens)
        if self.scope == "batch":
            sums_S2 = context.world.gather(sums_S2).sum(0).expand_as(sums_S2)
        mean_S = (sums_S2[:, 0] / sums_S2[:, 1].clamp_min(1.0)).clamp_min(1.0)  # no weight of a token is below 1
        return weight_N / mean_S.to(weight_N.dtype)[tokens.sequences_N]


def _sums(x_NC: Tensor, tokens: Tokens) -> Tensor:
    """By sequence, in float64, so that another order of rows changes nothing that matters."""
    return x_NC.new_zeros(len(tokens.keys_S), x_NC.shape[1]).index_add_(0, tokens.sequences_N, x_NC)
