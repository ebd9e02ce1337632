"""Which tokens of a draft a target would accept: speculative decoding's rule, in blocks of a response."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count, Share
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Selector
from tropd.types import Author


def since_rejection(tokens: Tokens, block: int) -> Tensor:
    """How many student's tokens of its block lie between a token and the first rejected one: -1 where it is accepted.

    A token is accepted if, up to it, student and teacher have the same likeliest token everywhere in its block.
    """
    student_N = tokens.authors_N == Author.STUDENT
    rows = student_N.nonzero().flatten()
    since_N = torch.full_like(tokens.token_ids_N, -1)
    if len(rows) == 0:
        return since_N
    place = tokens.num_before_N[rows]
    num_blocks = int(place.max()) // block + 1
    agrees_SBP = torch.zeros((len(tokens.keys_S), num_blocks, block), dtype=torch.int64, device=rows.device)
    cell = tokens.sequences_N[rows], place // block, place % block
    agrees_SBP[cell] = (tokens.teacher_topk_ids_NK[rows, 0] == tokens.student_topk_ids_NJ[rows, 0]).long()
    num_accepted_SB = agrees_SBP.cumprod(-1).sum(-1)
    since_N[rows] = (place % block - num_accepted_SB[cell[:2]]).clamp_min(-1)
    return since_N


@dataclass(frozen=True)
class Accepted(Selector):
    """1 on the student's tokens before the first rejection of their block of `block` student's tokens.

    A token is rejected where the student's likeliest next token is not the teacher's.

    >>> tokens = some_tokens(teacher_topk_ids_NK=[[5], [6], [7], [8]], student_topk_ids_NJ=[[5], [9], [7], [8]])
    >>> Accepted(block=3)(tokens, Context())
    tensor([1., 0., 0., 1.])
    """

    block: Count = 16
    own_needs = Needs.TOPK | Needs.STUDENT_TOPK
    own_reach = Reach.SEQUENCE
    teacher_top_k = student_top_k = 1

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        accepted_N = (since_rejection(tokens, self.block) < 0) & (tokens.authors_N == Author.STUDENT)
        return as_weight(accepted_N, tokens.token_ids_N)


@dataclass(frozen=True)
class Rejected(Selector):
    """discount^k on the k-th student's token after the first rejection of its block, 1 on that one, 0 before.

    >>> tokens = some_tokens(teacher_topk_ids_NK=[[5], [6], [7], [8]], student_topk_ids_NJ=[[5], [9], [7], [8]])
    >>> Rejected(block=4, discount=0.5)(tokens, Context())
    tensor([0.0000, 1.0000, 0.5000, 0.2500])
    """

    block: Count = 16
    discount: Share = 0.8
    own_needs = Needs.TOPK | Needs.STUDENT_TOPK
    own_reach = Reach.SEQUENCE
    teacher_top_k = student_top_k = 1

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        since_N = since_rejection(tokens, self.block)
        fading_N = torch.full_like(since_N, self.discount, dtype=tokens.dtype) ** since_N.clamp_min(0)
        return torch.where(since_N >= 0, fading_N, 0.0)
