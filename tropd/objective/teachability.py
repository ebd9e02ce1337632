"""What the student can learn at a token: where the teacher disagrees, but among tokens that the student considers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.measures import Normalised
from tropd.objective.support import as_planned, expected_gap, on_support
from tropd.objective.terms import Measure, Piece, Selector


@dataclass(frozen=True)
class UnionForwardKL(Measure):
    """KL(teacher || student), both renormalised on the union of both models' top-k, as of planning.

    >>> half, all = [-0.6931, -0.6931], [0.0, -1e4]  # the same two tokens, in the same order
    >>> tokens = some_tokens(teacher_topk_ids_NK=[[5, 6]], teacher_topk_logprobs_NK=[all], student_at_topk_NK=[half],
    ...     student_topk_ids_NJ=[[5, 6]], student_topk_logprobs_NJ=[half], teacher_at_student_topk_NJ=[all],
    ...     student_logprobs_N=[-0.6931])
    >>> UnionForwardKL(top_k=2)(tokens, Context())  # log 2
    tensor([0.6931])
    """

    top_k: Count = 16
    own_needs = Needs.TOPK | Needs.STUDENT_TOPK | Needs.STUDENT_AT_TOPK

    @property
    def teacher_top_k(self) -> int:
        return self.top_k

    @property
    def student_top_k(self) -> int:
        return self.top_k

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        log_t, log_s = (x.log_softmax(-1) for x in on_support("union", self.top_k, tokens, as_planned(tokens)))
        return expected_gap(log_t.exp(), log_t, log_s).clamp_min(0.0)


@dataclass(frozen=True)
class TeacherMassOnStudent(Measure):
    """The teacher's probability of the student's top-k tokens together, in [0, 1].

    >>> tokens = some_tokens(teacher_at_student_topk_NJ=[[-0.7, -1.4], [-3.0, -torch.inf]])
    >>> TeacherMassOnStudent(top_k=2)(tokens, Context())
    tensor([0.7432, 0.0498])
    """

    top_k: Count = 16
    own_needs = Needs.STUDENT_TOPK

    @property
    def student_top_k(self) -> int:
        return self.top_k

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return at_least_float32(tokens.teacher_at_student_topk_NJ[:, : self.top_k]).exp().sum(-1).clamp_max(1.0)


@dataclass(frozen=True)
class Teachability(Selector):
    """D~ C~: how far the teacher disagrees, times how much of its mass the student considers (TA-OPD).

        D  KL(teacher || student), renormalised on the union of both top-k
        C  the teacher's mass on the student's top-k
        ~  (x - Q05) / (Q95 - Q05) over the student's tokens of the batch on all ranks, cut to [0, 1]

    It is 0 where the teacher gives the student's top-k no probability at all.

    >>> far, near = [0.0, -1e4], [-0.6931, -0.6931]  # the teacher's, of the student's two likeliest tokens
    >>> tokens = some_tokens(teacher_topk_ids_NK=[[5, 6]] * 3, teacher_topk_logprobs_NK=[far, near, far],
    ...     student_at_topk_NK=[near, near, [-5.0, -5.0]], student_topk_ids_NJ=[[5, 6], [5, 6], [7, 8]],
    ...     student_topk_logprobs_NJ=[near] * 3, student_logprobs_N=[-0.6931] * 3,
    ...     teacher_at_student_topk_NJ=[far, near, [-torch.inf, -torch.inf]])
    >>> Teachability(top_k=2)(tokens, Context())  # teachable, agreed, out of reach
    tensor([0.1383, 0.0000, 0.0000])
    """

    top_k: Count = 16

    @property
    def _factors(self) -> tuple[Normalised, Normalised]:
        return Normalised(UnionForwardKL(self.top_k), "robust"), Normalised(TeacherMassOnStudent(self.top_k), "robust")

    def parts(self) -> Iterator[Piece]:
        yield from self._factors

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        far_N, reachable_N = (factor(tokens, context) for factor in self._factors)
        return torch.where(reachable_N > 0, far_N * reachable_N, 0.0)
