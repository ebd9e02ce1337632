"""What a choice leads to: how sure the teacher would be of the token after it (LGR, arXiv 2605.30833)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tropd.base.ranges import Count, Finite, NotNegative
from tropd.errors import ConfigError
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.terms import Piece, Reward
from tropd.types import READER, Author

if TYPE_CHECKING:
    from tropd.objective.objective import Objective


@dataclass(frozen=True)
class LookaheadBonus(Reward):
    """+ scale * z(x), where the student's entropy is above `nats` and x is among its `top_k` likeliest tokens.

        r_k = max_v pi_T(v | prefix, k)    z = (r - mean) / std over the student's `top_k` likeliest tokens k

    The deviation is divided by their number and at least 1e-4, so candidates that lead to the same have no bonus, and a
    single one has none either.

    >>> tokens = some_tokens(token_ids_N=[5, 6, 9], student_topk_ids_NJ=[[5, 6]] * 3, student_entropy_N=[0.5] * 3,
    ...     teacher_lookahead_NJ=[[-0.1, -2.0]] * 3)
    >>> LookaheadBonus(top_k=2)(torch.zeros(3), tokens, Context())
    tensor([ 1., -1.,  0.])
    """

    scale: Finite = 1.0
    top_k: Count = 8
    nats: NotNegative = 0.2
    own_needs = Needs.STUDENT_TOPK | Needs.STUDENT_ENTROPY | Needs.LOOKAHEAD

    @property
    def student_top_k(self) -> int:
        return self.top_k

    def candidates(self, tokens: Tokens) -> Tensor:
        """[N, J]: the tokens to look beyond, -1 where nobody asks."""
        asks_N = (tokens.authors_N == Author.STUDENT) & (tokens.student_entropy_N > self.nats)
        return tokens.student_topk_ids_NJ[:, : self.top_k].masked_fill(~asks_N[:, None], -1)

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        sure_NJ = at_least_float32(tokens.teacher_lookahead_NJ).exp()  # all 0 where nobody asked
        centred_NJ = sure_NJ - sure_NJ.mean(1, keepdim=True)
        z_NJ = centred_NJ / sure_NJ.std(1, correction=0, keepdim=True).clamp_min(1e-4)
        ids_NJ = tokens.student_topk_ids_NJ[:, : z_NJ.shape[1]]
        bonus_N = torch.where(ids_NJ == tokens.token_ids_N[:, None], z_NJ, 0.0).sum(1)
        bonus_N = torch.where(tokens.student_entropy_N > self.nats, bonus_N, 0.0)
        return reward_N + self.scale * bonus_N.to(reward_N.dtype)


def candidates_of(objective: Objective, tokens: Tokens, reader: str) -> Tensor:
    """[N, J]: the tokens that a reader is to look beyond, -1 where nobody asks."""
    roots = (piece for term in objective.terms for piece in (term.where, term.loss))
    looking = dict.fromkeys(piece for root in roots for piece in _looking(root, reader, READER))
    if len({(piece.top_k, piece.nats) for piece in looking}) != 1:
        raise ConfigError(
            f"{len(looking)} parts of the method look ahead with reader {reader!r}, beyond different tokens. Give all "
            "the same top_k and nats."
        )
    return next(iter(looking)).candidates(tokens.of(reader))


def _looking(piece: Piece | None, reader: str, around: str) -> Iterator[LookaheadBonus]:
    if piece is None:
        return
    own = piece.reader or around
    if isinstance(piece, LookaheadBonus) and own == reader:
        yield piece
    for part in piece.parts():
        yield from _looking(part, reader, own)
