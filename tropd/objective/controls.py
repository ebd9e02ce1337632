"""Selectors that choose without looking: the controls of methods that mask, cut or weigh.

A method that trains on fewer tokens, or weighs them, has to beat one that does so at random.  What they draw belongs to
a token's sequence and position, so it does not depend on micro-batches, order or ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count
from tropd.objective.context import Context, Reach
from tropd.objective.draws import uniform
from tropd.objective.evidence import Tokens
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Measure, Selector
from tropd.types import Author

_ORDER, _WINDOW, _DEAL = 11, 12, 13
"""Streams of `tropd.objective.draws`."""


@dataclass(frozen=True)
class AtRandom(Measure):
    """A number in [0, 1) for each token, drawn uniformly: `TopFraction(AtRandom(), 0.3)` is a random 30 %.

    >>> TopFraction(AtRandom(), 0.5)(some_tokens(token_ids_N=[5, 6, 7, 8]), Context()).sum()
    tensor(2.)
    """

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return uniform(tokens.keys_S[tokens.sequences_N], tokens.positions_N, _ORDER)


@dataclass(frozen=True)
class RandomWindow(Selector):
    """1 on `length` tokens in a row of what the student wrote of each response, from a place drawn uniformly.

    >>> RandomWindow(2)(some_tokens(token_ids_N=[5, 6, 7, 8]), Context()).sum()
    tensor(2.)
    """

    length: Count

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        spare_N = (tokens.num_before_N + tokens.num_after_N + 1 - self.length).clamp_min(0)
        place_N = uniform(tokens.keys_S[tokens.sequences_N], torch.zeros_like(tokens.positions_N), _WINDOW)
        start_N = (place_N.double() * (spare_N + 1)).long().minimum(spare_N)
        inside_N = (tokens.num_before_N >= start_N) & (tokens.num_before_N < start_N + self.length)
        return as_weight(inside_N & (tokens.authors_N == Author.STUDENT), tokens.token_ids_N)


@dataclass(frozen=True)
class Shuffled(Selector):
    """The weights of another selector, dealt at random to the student's tokens of the whole batch; those of other
    tokens stay.

    >>> tokens = some_tokens(token_ids_N=[5, 6, 7, 8])
    >>> Shuffled(PositionBelow(1))(tokens, Context()).sum()
    tensor(1.)
    """

    selector: Selector
    own_reach = Reach.BATCH

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        weight_N = self.selector(tokens, context)
        member_N = tokens.authors_N == Author.STUDENT
        keys_N = tokens.keys_S[tokens.sequences_N]
        gather = context.world.gather
        keys, places, weights = (gather(x[member_N]) for x in (keys_N, tokens.positions_N, weight_N))
        draws = gather(uniform(keys_N, tokens.positions_N, _DEAL)[member_N])
        # By its place in the batch, which is the same in every cut and order, and by its draw.
        named = torch.argsort(places, stable=True)
        named = named[torch.argsort(keys[named], stable=True)]
        drawn = named[torch.argsort(draws[named], stable=True)]
        dealt = torch.empty_like(weights)
        dealt[drawn] = weights[named]
        counts = gather(member_N.sum()[None])
        start = int(counts[: context.world.rank].sum())
        dealt_N = weight_N.clone()
        dealt_N[member_N] = dealt[start : start + int(counts[context.world.rank])]
        return dealt_N
