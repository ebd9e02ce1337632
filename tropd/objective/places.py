"""Selectors that look at which token was written and where it stands.  They read nothing of a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Whole
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Tokens, trained
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Selector
from tropd.types import Author


@dataclass(frozen=True)
class TokenIn(Selector):
    """1 where the written token is one of `ids`.  `~TokenIn(...)` leaves out special tokens.

    >>> tokens = some_tokens(token_ids_N=[5, 7, 9])
    >>> TokenIn((7,))(tokens, Context()), (~TokenIn((7,)))(tokens, Context())
    (tensor([0., 1., 0.]), tensor([1., 0., 1.]))
    """

    ids: tuple[Whole, ...]

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        ids = torch.tensor(self.ids, dtype=tokens.token_ids_N.dtype, device=tokens.token_ids_N.device)
        return as_weight(torch.isin(tokens.token_ids_N, ids), tokens.token_ids_N)


@dataclass(frozen=True)
class FirstOf(Selector):
    """1 where the student writes one of these ids for the first time in its response; each id counts by itself.

    >>> FirstOf((7,))(some_tokens(token_ids_N=[5, 7, 9, 7]), Context())
    tensor([0., 1., 0., 0.])
    """

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
    """1 on the first `limit` tokens of each response, counted among the tokens of the same author.

    So a teacher's prefix or a tool's answer does not use up the student's first positions.

    >>> tokens = some_tokens(authors_N=[Author.TEACHER, Author.STUDENT, Author.STUDENT, Author.STUDENT])
    >>> PositionBelow(2)(tokens, Context())  # one of the teacher's, two of the student's
    tensor([1., 1., 1., 0.])
    """

    limit: Whole

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight((tokens.num_before_N < self.limit) & trained(tokens), tokens.num_before_N)


@dataclass(frozen=True)
class LastPositions(Selector):
    """1 on the last `count` tokens of each response, counted among the tokens of the same author.

    >>> LastPositions(1)(some_tokens(token_ids_N=[5, 6, 7], sequences_N=[0, 0, 1]), Context())
    tensor([0., 1., 1.])
    """

    count: Whole

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight((tokens.num_after_N < self.count) & trained(tokens), tokens.num_after_N)
