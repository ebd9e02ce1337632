"""Loss and gradient of a tile of tokens while its logits are in cache: one pass over the vocabulary.

    z = h W^T                                        [C, V]      matrix product 1
    p = softmax z,  L = log sum_v exp z_v                        one exponential per logit, in place
    log p(v) = z_v - L                                           at the wanted ids only
    the objective, local to a row once planned, gives  c_m = d loss / d log p(id_m)
    d loss / d z = sum_m c_m e(id_m) - a p,   a = sum_m c_m
    d h = -diag(a) p W   + sum_m c_m W[id_m]                     matrix product 2, sparse rows
    d W = -p^T diag(a) h + scatter(c_m h)                        matrix product 3, sparse rows

Nothing of size [tokens, V] outlives its tile.  In a half-precision tile the logits that decide a row are computed again
in float32 (`tropd.model.peaks`); their part of the gradient is taken out of the tile and added in float32 too.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.head import Head, tiles
from tropd.model.own_top_k import OwnTopK
from tropd.model.parts import GATHERED, TileLoss, wide_rows
from tropd.model.peaks import Peaks, find_peaks, products_at
from tropd.model.products import WideSum, add_product_


@dataclass(frozen=True, kw_only=True)
class TileWork:
    """The inputs of a fused pass that need no gradient."""

    ids_NM: Tensor
    """Wanted tokens of each row; column 0 is the written one."""
    loss_of: TileLoss
    tile_tokens: int
    scale: float
    """z = scale * (h W^T + b)."""
    tile_vocab: int | None = None
    """Vocabulary size of a tile; None for the whole vocabulary."""
    own: OwnTopK | None = None
    """What probes want to know of the tile; it changes nothing."""


def matrix_of(head: Head) -> tuple[Tensor, Tensor | None, float]:
    """Weight, bias and scale of the rows that are tokens."""
    weight, bias = head.weight_VH, head.bias_V
    if head.vocab_size < weight.shape[0]:
        weight, bias = weight[: head.vocab_size], None if bias is None else bias[: head.vocab_size]
    return weight, bias, head.factor / head.divisor


def logits_of(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, buffer_CV: Tensor) -> Tensor:
    z_CV = buffer_CV[: len(hidden_CH)]
    if bias_V is None:
        torch.mm(hidden_CH, weight_VH.t(), out=z_CV)
    else:
        torch.addmm(bias_V, hidden_CH, weight_VH.t(), out=z_CV)
    return z_CV.mul_(scale) if scale != 1.0 else z_CV


class Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: TileWork) -> Tensor:
        sums = Gradients(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        num_tokens, size = hidden_NH.shape[0], weight_VH.shape[0]
        buffer_CV = hidden_NH.new_empty(min(work.tile_tokens, num_tokens), size)
        losses = []
        for rows in tiles(num_tokens, work.tile_tokens):
            hidden_CH = hidden_NH[rows]
            z_CV = logits_of(hidden_CH, weight_VH, bias_V, work.scale, buffer_CV)
            losses.append(_tile(rows, hidden_CH, z_CV, weight_VH, bias_V, work, sums))
        sums.save(ctx, hidden_NH.dtype, weight_VH.dtype)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        (scale,) = upstream
        once = float(scale) == 1.0

        def finish(gradient: Tensor | None, dtype: torch.dtype) -> Tensor | None:
            if gradient is None:
                return None
            return (gradient if once else gradient * scale).to(dtype)

        hidden_NH, weight_VH, bias_V = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if once and ctx.weight is not None:
            weight_VH = ctx.weight.rounded(weight_dtype)
        return finish(hidden_NH, hidden_dtype), finish(weight_VH, weight_dtype), finish(bias_V, weight_dtype), None


class Gradients:
    """Accumulators, in float32 or wider for any dtype of the model.  The first tile fills empty ones."""

    def __init__(self, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, wants: Sequence[bool]) -> None:
        dtype = torch.promote_types(hidden_NH.dtype, torch.float32)
        self.hidden_NH = torch.empty_like(hidden_NH, dtype=dtype)
        self.weight = WideSum(weight_VH) if wants[1] else None
        self.weight_VH = None if self.weight is None else self.weight.sum_AB
        self.bias_V = torch.zeros_like(bias_V, dtype=dtype) if wants[2] and bias_V is not None else None

    def save(self, ctx: Any, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        """For the backward pass, which may run once: it writes over the weight's sum."""
        ctx.save_for_backward(self.hidden_NH, self.weight_VH, self.bias_V)
        ctx.weight, ctx.dtypes = self.weight, (hidden_dtype, weight_dtype)


def _tile(
    rows: slice,
    hidden_CH: Tensor,
    z_CV: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    work: TileWork,
    sums: Gradients,
) -> Tensor:
    """One tile: read, take the loss, and add its gradients."""
    ids_CM = work.ids_NM[rows]
    peaks = find_peaks(z_CV, ids_CM[:, 0], partial(products_at, hidden_CH, weight_VH, bias_V, work.scale))
    if work.own is not None:
        work.own.look(rows, z_CV, peaks)
    wanted_CM = peaks.patch(ids_CM, z_CV.gather(1, ids_CM))
    rounded_log_sum_C = soften_rows_(z_CV, peaks.highest_C)
    log_sum_C = peaks.log_sum(rounded_log_sum_C)
    logprobs_CM = (wanted_CM - log_sum_C[:, None]).requires_grad_()
    with torch.enable_grad():
        loss = work.loss_of(rows, logprobs_CM)
    (c_CM,) = torch.autograd.grad(loss, logprobs_CM)
    c_CM = c_CM * work.scale
    dense_C = -c_CM.sum(1)
    hidden_wide = hidden_CH.to(sums.hidden_NH.dtype)
    z_CV[torch.arange(len(z_CV), device=z_CV.device)[:, None], peaks.ids_CE] = 0.0
    tile_C = dense_C * (rounded_log_sum_C - log_sum_C).exp()
    sums.hidden_NH[rows] = torch.mm(z_CV, weight_VH).to(hidden_wide.dtype).mul_(tile_C[:, None])
    if sums.weight_VH is not None:
        pulled_CH = (hidden_wide * tile_C[:, None]).to(z_CV.dtype)
        add_product_(sums.weight_VH, z_CV.t(), pulled_CH, first=rows.start == 0)
    if sums.bias_V is not None:
        sums.bias_V.add_(torch.mv(z_CV.t(), tile_C.to(z_CV.dtype)))
    add_sparse(rows, hidden_wide, weight_VH, ids_CM, c_CM, sums)
    add_peaks(rows, hidden_wide, weight_VH, peaks, log_sum_C, dense_C, sums)
    return loss.detach()


def kernels_for(z_CV: Tensor) -> ModuleType | None:
    """`tropd.model.kernels`, if it can handle this tile: on CUDA, or in Triton's interpreter."""
    on = z_CV.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    if not on or z_CV.dtype == torch.float64 or find_spec("triton") is None:
        return None
    from tropd.model import kernels

    if not kernels.agree(z_CV.device, z_CV.dtype):
        return None
    TAKEN.add(FastPath.KERNELS)
    return kernels


def soften_rows_(z_CV: Tensor, highest_C: Tensor | None = None) -> Tensor:
    """In place z <- softmax(z); gives log sum exp z of each row, in float32 at least.

    The sum is read off the largest probability, which is at least 1/V: log sum exp z = max z - log max p.  `highest_C`
    are the ids of the largest logits, where they are known.
    """
    if kernels := kernels_for(z_CV):
        return kernels.softmax_rows_(z_CV)
    log_sum_C = z_CV.new_empty(len(z_CV), dtype=torch.promote_types(z_CV.dtype, torch.float32))
    for part, p_rV in wide_rows(z_CV, keep=False):
        log_sum_C[part] = _soften_(p_rV, None if highest_C is None else highest_C[part])
    return log_sum_C


def _soften_(p_rV: Tensor, highest_r: Tensor | None) -> Tensor:
    """In place; a row of -inf has the sum 0, so log sum -inf, and no softmax."""

    def highest() -> Tensor:
        return p_rV.amax(-1) if highest_r is None else p_rV.gather(1, highest_r[:, None])[:, 0]

    most_r = highest()
    torch.softmax(p_rV, -1, out=p_rV)
    return torch.where(most_r == -torch.inf, most_r, most_r - highest().log())


def log_sum_exp(z_CV: Tensor, entropy: bool = False, highest_C: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """log sum exp z of each row, and the entropy if wanted (else no rows); z stays unchanged."""
    if kernels := kernels_for(z_CV):
        return kernels.log_sum_rows(z_CV, entropy)
    wide = torch.promote_types(z_CV.dtype, torch.float32)
    log_sum_C = z_CV.new_empty(len(z_CV), dtype=wide)
    entropy_C = z_CV.new_empty(len(z_CV) if entropy else 0, dtype=wide)
    for part, p_rV in wide_rows(z_CV, keep=True):
        log_sum_C[part] = _soften_(p_rV, None if highest_C is None else highest_C[part])
        if entropy:  # H = log Z - sum p z
            entropy_C[part] = log_sum_C[part] - torch.where(p_rV > 0, p_rV * z_CV[part], 0.0).sum(-1)
    return log_sum_C, entropy_C


def add_sparse(
    rows: slice, hidden_CH: Tensor, weight_VH: Tensor, ids_CM: Tensor, c_CM: Tensor, sums: Gradients
) -> None:
    """sum_m c_m W[id_m] into d h, c_m h into the rows id_m of d W: first the written token, then whole supports."""
    wide, gradient_CH = hidden_CH.dtype, sums.hidden_NH[rows]
    gradient_CH.addcmul_(weight_VH[ids_CM[:, 0]].to(wide), c_CM[:, :1])
    if sums.weight_VH is not None:
        sums.weight_VH.index_add_(0, ids_CM[:, 0], hidden_CH * c_CM[:, :1])
    if sums.bias_V is not None:
        sums.bias_V.index_add_(0, ids_CM.flatten(), c_CM.flatten())
    if ids_CM.shape[1] == 1:
        return
    busy = (c_CM[:, 1:] != 0).any(1).nonzero().flatten()
    if len(busy) > GATHERED:
        TAKEN.add(FastPath.SUPPORTS_IN_PARTS)
    _spread(busy, gradient_CH, hidden_CH, weight_VH, ids_CM[:, 1:], c_CM[:, 1:], sums)


def add_peaks(
    rows: slice, hidden_CH: Tensor, weight_VH: Tensor, peaks: Peaks, log_sum_C: Tensor, dense_C: Tensor, sums: Gradients
) -> None:
    """Add -a p~ at the peaks, which the tile does not hold."""
    if not peaks.ids_CE.shape[1]:
        return
    c_CE = dense_C[:, None] * (peaks.exact_CE - log_sum_C[:, None]).exp()
    every = torch.arange(len(c_CE), device=c_CE.device)
    _spread(every, sums.hidden_NH[rows], hidden_CH, weight_VH, peaks.ids_CE, c_CE, sums)
    if sums.bias_V is not None:
        sums.bias_V.index_add_(0, peaks.ids_CE.flatten(), c_CE.flatten())


def _spread(
    rows: Tensor,
    gradient_CH: Tensor,
    hidden_CH: Tensor,
    weight_VH: Tensor,
    ids_CM: Tensor,
    c_CM: Tensor,
    sums: Gradients,
) -> None:
    """sum_m c_m W[id_m] into d h and c_m h into d W, for some rows."""
    for some in rows.split(GATHERED):
        ids, c = ids_CM[some], c_CM[some]
        gradient_CH[some] += torch.bmm(c[:, None], weight_VH[ids].to(c.dtype)).squeeze(1)
        if sums.weight_VH is not None:
            spread = (hidden_CH[some][:, None] * c[:, :, None]).flatten(0, 1)
            sums.weight_VH.index_add_(0, ids.flatten(), spread)
