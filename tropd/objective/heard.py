"""What a term sees where its readers did not read everything."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from tropd.objective.evidence import Tokens
from tropd.types import Author


def as_heard(tokens: Tokens, readers: Iterable[str]) -> Tokens:
    """What a term of these readers sees: what one of them did not read is text that nobody trains on."""
    each = [tokens.of(name) for name in readers]
    read_N, num_S = None, tokens.num_actions_S
    for of in each:
        if (own_S := of.peek("read_S")) is not None:
            read_N, num_S = _both(read_N, own_S[tokens.sequences_N]), torch.where(own_S, num_S, 0)
        if (own_N := of.peek("read_N")) is not None:
            read_N, num_S = _both(read_N, own_N), torch.minimum(num_S, of.num_read_S)
    if read_N is None:
        return tokens
    authors_N = torch.where(read_N, tokens.authors_N, int(Author.ENVIRONMENT))
    return tokens.with_(authors_N=authors_N, num_actions_S=num_S)


def _both(a_N: Tensor | None, b_N: Tensor) -> Tensor:
    return b_N if a_N is None else a_N & b_N
