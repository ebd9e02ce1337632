"""Tokens that probes look at where looking at all of them would cost a top-k each: a fixed, random eighth."""

from __future__ import annotations

from torch import Tensor

from tropd.objective.draws import uniform
from tropd.objective.evidence import Tokens

SHARE = 1 / 8
_STREAM = 2


def sampled_rows(tokens: Tokens) -> Tensor:
    """The same tokens in any batch, whatever the method thinks of them."""
    return uniform(tokens.keys_S[tokens.sequences_N], tokens.positions_N, _STREAM) < SHARE
