"""What tiles of tokens share: their loss, and how many rows are worked on at once: a few on a CPU, so that they stay in
cache, all of them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath

TileLoss = Callable[[slice, Tensor], Tensor]
"""(rows, log-probabilities of the chosen tokens [C, M] or of all [C, V], with gradient) -> the loss of these rows."""

GATHERED = 256
"""Rows for which weight rows are gathered at once: bounds the gathered [rows, M, H]."""
_ROWS_IN_CACHE = 8
_IN_CACHE = 2**18
"""Logits that are worked on at once on a CPU, if that is more than 8 rows: 1 MiB of float32."""


def wide_rows(z_CV: Tensor, *, keep: bool) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, in float32 or wider, for in-place changes: z gets the changes, unless `keep`."""
    wide = torch.promote_types(z_CV.dtype, torch.float32)
    step = rows_at_once(z_CV)
    if step < len(z_CV):
        TAKEN.add(FastPath.SOFTMAX_IN_PARTS)
    copies = keep or z_CV.dtype != wide
    scratch_rV = z_CV.new_empty(min(step, len(z_CV)) if copies else 0, z_CV.shape[1], dtype=wide)
    for start in range(0, len(z_CV), step):
        part = slice(start, start + step)
        z_rV = z_CV[part]
        x_rV = scratch_rV[: len(z_rV)].copy_(z_rV) if copies else z_rV
        yield part, x_rV
        if copies and not keep:
            z_rV.copy_(x_rV)


def rows_at_once(z_CV: Tensor) -> int:
    if z_CV.device.type != "cpu":
        return len(z_CV) or 1
    return max(_ROWS_IN_CACHE, _IN_CACHE // max(z_CV.shape[1], 1))
