"""Selectors that look at which token was written, where it stands and how long its response is.

They read nothing of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self, cast

import torch
from torch import Tensor
from torch.nn.functional import max_pool1d

from tropd.base.ranges import Count, PositiveShare, Whole
from tropd.errors import EvidenceError
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Tokens, trained
from tropd.objective.measures import kth_highest, padded
from tropd.objective.selectors import Everywhere, as_weight
from tropd.objective.terms import Selector
from tropd.types import Author


class _Named:
    """Tokens by their ids and by their texts."""

    ids: tuple[int, ...]
    texts: tuple[str, ...]

    def with_ids(self, id_of: Callable[[str], int]) -> Self:
        return replace(cast(Any, self), ids=(*self.ids, *map(id_of, self.texts)), texts=())

    def named_ids(self) -> Iterator[int]:
        yield from self.ids

    @property
    def known_ids(self) -> tuple[int, ...]:
        if self.texts:
            raise EvidenceError(
                f"tokens are named by their texts {', '.join(map(repr, self.texts))}, and no tokenizer was asked for "
                "their ids. Give ids, or call `with_ids` of the objective."
            )
        return self.ids


@dataclass(frozen=True)
class TokenIn(_Named, Selector):
    """1 where the written token is one of `ids`.  `~TokenIn(...)` leaves out special tokens.

    `texts` name more of them, which `with_ids` turns into ids.

    >>> tokens = some_tokens(token_ids_N=[5, 7, 9])
    >>> TokenIn((7,))(tokens, Context()), (~TokenIn((7,)))(tokens, Context())
    (tensor([0., 1., 0.]), tensor([1., 0., 1.]))
    """

    ids: tuple[Whole, ...] = ()
    texts: tuple[str, ...] = ()

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        ids = torch.tensor(self.known_ids, dtype=tokens.token_ids_N.dtype, device=tokens.token_ids_N.device)
        return as_weight(torch.isin(tokens.token_ids_N, ids), tokens.token_ids_N)


@dataclass(frozen=True)
class FirstOf(_Named, Selector):
    """1 where the student writes one of these ids for the first time in its response; each id counts by itself.

    `texts` name more of them, which `with_ids` turns into ids.

    >>> FirstOf((7,))(some_tokens(token_ids_N=[5, 7, 9, 7]), Context())
    tensor([0., 1., 0., 0.])
    """

    ids: tuple[Whole, ...] = ()
    texts: tuple[str, ...] = ()
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        first_N = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.token_ids_N.device)
        for token_id in self.known_ids:
            here_N = (tokens.token_ids_N == token_id) & (tokens.authors_N == Author.STUDENT)
            place_N = torch.where(here_N, tokens.num_before_N, torch.iinfo(tokens.num_before_N.dtype).max)
            earliest_S = place_N.new_full((len(tokens.keys_S),), torch.iinfo(place_N.dtype).max)
            earliest_S.scatter_reduce_(0, tokens.sequences_N, place_N, "amin")
            first_N |= here_N & (place_N == earliest_S[tokens.sequences_N])
        return as_weight(first_N, tokens.token_ids_N)


@dataclass(frozen=True)
class Near(Selector):
    """1 within `window` tokens of a token that another selector weighs, before or after it in its response.

    >>> Near(TokenIn((7,)), window=1)(some_tokens(token_ids_N=[5, 7, 9, 6]), Context())
    tensor([1., 1., 1., 0.])
    """

    inner: Selector
    window: Whole = 0
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        inner_N = (self.inner(tokens, context) > 0) & trained(tokens)
        if self.window == 0 or len(tokens) == 0:
            return as_weight(inner_N, tokens.token_ids_N)
        inner_ST = padded(inner_N.float(), tokens)
        near_ST = max_pool1d(inner_ST[:, None], 2 * self.window + 1, stride=1, padding=self.window)[:, 0]
        return near_ST[tokens.sequences_N, tokens.positions_N]


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
