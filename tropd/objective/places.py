"""Selectors that look at which token was written, where it stands and how long its response is.

They read nothing of a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count, PositiveShare, Whole
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Tokens, trained
from tropd.objective.measures import kth_highest
from tropd.objective.selectors import Everywhere, as_weight
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


@dataclass(frozen=True)
class ShorterThan(Selector):
    """1 on the tokens of responses of fewer than `limit` tokens, counted among those that can be trained on.

    >>> ShorterThan(2)(some_tokens(token_ids_N=[5, 6, 7], sequences_N=[0, 0, 1]), Context())
    tensor([0., 0., 1.])
    """

    limit: Count

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.num_actions_S[tokens.sequences_N] < self.limit, tokens.token_ids_N)


@dataclass(frozen=True)
class Shortest(Selector):
    """1 on the tokens in `among` of the `fraction` of their group's responses, rounded up, that are shortest.

    Responses without a token in `among` do not count; ties at the cut are kept.

    >>> tokens = some_tokens(token_ids_N=[5, 6, 7], sequences_N=[0, 0, 1], groups_S=[0, 0])
    >>> Shortest(0.5)(tokens, Context())
    tensor([0., 0., 1.])
    """

    fraction: PositiveShare = 0.5
    among: Selector = Everywhere()
    own_reach = Reach.GROUP

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        among_N = self.among(tokens, context)
        member_S = torch.zeros_like(tokens.num_actions_S, dtype=torch.bool)
        member_S[tokens.sequences_N[(among_N > 0) & trained(tokens)]] = True
        everyone = context.world.gather(torch.stack([tokens.groups_S, tokens.num_actions_S], 1)[member_S])
        if len(everyone) == 0:
            return torch.zeros_like(among_N)
        names, index = torch.unique(everyone[:, 0], return_inverse=True)
        cut_G = -kth_highest(-everyone[:, 1], index, self.fraction)
        slot_S = torch.searchsorted(names, tokens.groups_S).clamp(max=len(names) - 1)
        short_S = member_S & (tokens.num_actions_S <= cut_G[slot_S])
        return among_N * short_S[tokens.sequences_N]
