"""The head for whole distributions: one tile of logits at a time, its gradient formed before the next tile.

    z = h W^T,   l = objective(log softmax z),   g = d l / d z          [C, V], gone after the tile
    d h = g W,   d W = g^T h

Serves divergences over the whole vocabulary and heads that soft-cap their logits.  Three matrix products, as in
`tropd.model.fused`, but the softmax's gradient is autograd's, so a tile costs a few copies of itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.head import Head, tiles
from tropd.model.parts import TileLoss
from tropd.model.peaks import is_matrix


def can_tile(head: Head) -> bool:
    """Whether the head is a plain matrix, so that its gradient can be formed here."""
    return is_matrix(head.module)


def dense_loss(head: Head, hidden_NH: Tensor, written_N: Tensor, loss_of: TileLoss, tile_tokens: int) -> Tensor:
    """The loss of all rows, with its gradient already formed."""
    TAKEN.add(FastPath.DENSE_HEAD)
    return _Dense.apply(hidden_NH, head.weight_VH, head.bias_V, head, written_N, loss_of, tile_tokens)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        head: Head,
        written_N: Tensor,
        loss_of: TileLoss,
        tile_tokens: int,
    ) -> Tensor:
        wide = torch.promote_types(hidden_NH.dtype, torch.float32)
        trained, shifted = ctx.needs_input_grad[1:3]
        hidden_gradient = torch.empty_like(hidden_NH, dtype=wide)
        weight_gradient = torch.zeros_like(weight_VH, dtype=wide) if trained else None
        bias_gradient = torch.zeros_like(bias_V, dtype=wide) if shifted and bias_V is not None else None
        size, losses = head.vocab_size, []
        for rows in tiles(hidden_NH.shape[0], tile_tokens):
            hidden_CH = hidden_NH[rows]
            z_CV = torch.nn.functional.linear(hidden_CH, weight_VH[:size], None if bias_V is None else bias_V[:size])
            z_CV.requires_grad_()
            with torch.enable_grad():
                logits_CV = head.widened(z_CV, hidden_CH, written_N[rows])
                loss = loss_of(rows, logits_CV.log_softmax(-1))
            (g_CV,) = torch.autograd.grad(loss, z_CV)
            hidden_gradient[rows] = (g_CV @ weight_VH[:size]).to(wide)
            if weight_gradient is not None:
                weight_gradient[:size] += g_CV.t() @ hidden_CH
            if bias_gradient is not None:
                bias_gradient[:size] += g_CV.sum(0, dtype=wide)
            losses.append(loss.detach())
        ctx.save_for_backward(hidden_gradient, weight_gradient, bias_gradient)
        ctx.dtypes = hidden_NH.dtype, weight_VH.dtype
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        (scale,) = upstream
        dtypes = ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1]
        found = zip(ctx.saved_tensors, dtypes, strict=True)
        return *(None if g is None else (g * scale).to(dtype) for g, dtype in found), None, None, None, None
