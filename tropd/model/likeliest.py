"""The likeliest tokens of a tile of logits, without sorting it.

Two levels where the vocabulary is large: the largest logits lie in the columns with the largest maxima.

    z_0      z_1      ..  z_W-1          W = V // 64 columns of 64 tokens, strided, so that maxima are taken
    z_W      z_W+1    ..  z_2W-1         along memory; the remainder is searched whole
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.parts import rows_at_once

_HEIGHT = 64
_SLACK = 32
"""Extra columns beyond `top_k`, so that few rows have an equal logit in a column that was not searched."""


def likeliest(
    logits_CV: Tensor, top_k: int, maxima_CW: Tensor | None = None, rows_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Ids and logits [N, K] of the `top_k` likeliest tokens of some rows, likeliest first, equal ones by id.

    torch.topk promises nothing about equal logits, and in half precision many are equal: so more candidates are taken
    than needed, and if even the best of the others may equal the k-th, the whole row is searched.
    """
    ids_NP, logits_NP, bound_N = _pool(logits_CV, top_k + _SLACK, maxima_CW, rows_N)
    num_candidates = min(4 * top_k + 16, ids_NP.shape[1])
    ids_NC, order_NC = ids_NP.gather(1, chosen_NC := logits_NP.topk(num_candidates, dim=-1).indices).sort(dim=-1)
    logits_NC = logits_NP.gather(1, chosen_NC.gather(1, order_NC))
    logits_NC, order_NC = logits_NC.sort(dim=-1, descending=True, stable=True)
    logits_NK, ids_NK = logits_NC[:, :top_k].clone(), ids_NC.gather(1, order_NC)[:, :top_k].clone()
    spills_N = (logits_NC[:, -1] == logits_NK[:, -1]) & (num_candidates < ids_NP.shape[1])
    spilled = (spills_N | (bound_N == logits_NK[:, -1])).nonzero().squeeze(1)
    if len(spilled):
        ordered = logits_CV[spilled if rows_N is None else rows_N[spilled]].sort(dim=-1, descending=True, stable=True)
        ids_NK[spilled], logits_NK[spilled] = ordered.indices[:, :top_k], ordered.values[:, :top_k]
    return ids_NK, logits_NK


def largest(logits_CV: Tensor, number: int, maxima_CW: Tensor | None = None) -> Tensor:
    """Ids [C, number] of the largest logits, in any order; ties are broken arbitrarily."""
    ids_CP, logits_CP, _ = _pool(logits_CV, number, maxima_CW, None)
    return ids_CP.gather(1, logits_CP.topk(number, dim=-1).indices)


def column_maxima(logits_CV: Tensor) -> Tensor:
    """[C, W], to be made once for several searches in the same logits."""
    width = logits_CV.shape[1] // _HEIGHT
    columns_CDW = logits_CV[:, : _HEIGHT * width].unflatten(1, (_HEIGHT, width))
    if logits_CV.device.type != "cpu" or logits_CV.dtype in (torch.float32, torch.float64):
        return columns_CDW.amax(1)
    # A CPU compares halves slowly.  Read as integers they have the same order from 0 on, and the reverse order below.
    bits_CDW = columns_CDW.view(torch.int16)
    maxima_CW = bits_CDW.amax(1)
    below_CW = maxima_CW < 0
    if bool(below_CW.any()):
        maxima_CW = torch.where(below_CW, bits_CDW.amin(1), maxima_CW)
    return maxima_CW.view(logits_CV.dtype)


def _column_maxima_of(logits_CV: Tensor, rows_N: Tensor | None) -> Tensor:
    """The column maxima of some rows, without a copy of all rows."""
    if rows_N is None:
        return column_maxima(logits_CV)
    return torch.cat([column_maxima(logits_CV[some]) for some in rows_N.split(rows_at_once(logits_CV))])


def _pool(
    logits_CV: Tensor, number: int, maxima_CW: Tensor | None, rows_N: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and logits of tokens that include a row's `number` largest, and the largest logit outside of them."""

    def chosen(x: Tensor) -> Tensor:
        return x if rows_N is None else x[rows_N]

    size, device = logits_CV.shape[1], logits_CV.device
    width = size // _HEIGHT
    if width <= 2 * number:
        logits_NV = chosen(logits_CV)
        every = torch.arange(size, device=device).expand(len(logits_NV), -1)
        return every, logits_NV, torch.full_like(logits_NV[:, 0], -torch.inf)
    TAKEN.add(FastPath.COLUMNS)
    maxima_NW = chosen(maxima_CW) if maxima_CW is not None else _column_maxima_of(logits_CV, rows_N)
    highest_NC, columns_NC = maxima_NW.topk(number + 1, dim=-1)
    down = torch.arange(_HEIGHT, device=device) * width
    rest = torch.arange(_HEIGHT * width, size, device=device).expand(len(maxima_NW), -1)
    ids_NP = torch.cat([(columns_NC[:, :number, None] + down).flatten(1), rest], dim=1)
    if rows_N is None:
        return ids_NP, logits_CV.gather(1, ids_NP), highest_NC[:, number]
    logits_NP = logits_CV.flatten().index_select(0, (ids_NP + size * rows_N[:, None]).flatten()).view_as(ids_NP)
    return ids_NP, logits_NP, highest_NC[:, number]
