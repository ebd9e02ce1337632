"""Loss and gradient with the vocabulary tiled as well: the workspace is [C, v], whatever V is.

    first visit    L = log sum_j exp L_j,  L_j = log sum exp of tile j;  z at the wanted ids, each from its own tile
    loss           c_m = d loss / d log p(id_m),  a = sum_m c_m
    second visit   p_j = exp(z_j - L),   d h -= diag(a) p_j W_j,   d W_j -= p_j^T diag(a) h
    sparse rows    as in `tropd.model.fused`

Logits are computed twice, so four matrix products instead of three; the second visit goes backwards and finds the last
tile still in the buffer, so one tile over the whole vocabulary costs three.  An id outside a tile is clamped into it,
and what it reads there is thrown away: unclamped it would read a neighbour's column.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import ConfigError, VocabularyError
from tropd.model.fused import (
    Fused,
    Gradients,
    TileWork,
    add_peaks,
    add_sparse,
    kernels_for,
    log_sum_exp,
    logits_of,
    matrix_of,
)
from tropd.model.head import Head, tiles
from tropd.model.likeliest import largest, likeliest
from tropd.model.own_top_k import OwnTopK
from tropd.model.parts import TileLoss, wide_rows
from tropd.model.peaks import NUM_PEAKS, Peaks, has_peaks, make_peaks, products_at
from tropd.model.products import add_product_


def lean_loss(
    head: Head,
    hidden_NH: Tensor,
    ids_NM: Tensor,
    loss_of: TileLoss,
    tile_tokens: int,
    tile_vocab: int,
    own: OwnTopK | None = None,
) -> Tensor:
    """What `fused_loss` gives, from a workspace of tile_tokens * tile_vocab logits."""
    TAKEN.add(FastPath.LEAN_HEAD)
    weight_VH, bias_V, scale = matrix_of(head)
    _check(ids_NM, tile_vocab, head.vocab_size)
    work = TileWork(
        ids_NM=ids_NM, loss_of=loss_of, tile_tokens=tile_tokens, scale=scale, tile_vocab=tile_vocab, own=own
    )
    return _Lean.apply(hidden_NH, weight_VH, bias_V, work)


@torch.no_grad()
def lean_rows(
    head: Head,
    hidden_NH: Tensor,
    ids_NM: Tensor,
    tile_tokens: int,
    tile_vocab: int,
    *,
    top_k: int = 0,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """What `read_rows` gives, from a workspace of tile_tokens * tile_vocab logits."""
    TAKEN.add(FastPath.LEAN_READ)
    weight_VH, bias_V, scale = matrix_of(head)
    _check(ids_NM, tile_vocab, head.vocab_size)
    found, buffer = [], _buffer(hidden_NH, weight_VH, tile_tokens, tile_vocab)
    for rows in tiles(len(hidden_NH), tile_tokens):
        visit = _Visit(hidden_NH[rows], weight_VH, bias_V, scale, tile_vocab, buffer)
        wanted_CM, log_sum_C, _, extra = visit.read(ids_NM[rows], top_k=top_k, entropy=entropy)
        part = {"at": wanted_CM - log_sum_C[:, None], "log_z": log_sum_C[:, None], **extra}
        if top_k:
            part["topk"] = part["topk"] - log_sum_C[:, None]
        found.append(part)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


class _Visit:
    """The logits of one tile of tokens, one tile of the vocabulary at a time, in one buffer."""

    def __init__(
        self,
        hidden_CH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        scale: float,
        tile_vocab: int,
        buffer: Tensor,
    ) -> None:
        self.hidden_CH, self.weight_VH, self.bias_V, self.scale = hidden_CH, weight_VH, bias_V, scale
        size = weight_VH.shape[0]
        self.parts = [slice(start, min(start + tile_vocab, size)) for start in range(0, size, tile_vocab)]
        self.buffer = buffer
        self.held: slice | None = None

    def logits(self, part: slice) -> Tensor:
        """z of one part of the vocabulary; computed again unless it was the last part."""
        width = part.stop - part.start
        z_Cv = self.buffer[: len(self.hidden_CH) * width].view(-1, width)
        if self.held != part:
            bias_v = None if self.bias_V is None else self.bias_V[part]
            logits_of(self.hidden_CH, self.weight_VH[part], bias_v, self.scale, z_Cv)
            self.held = part
        return z_Cv

    def read(
        self, ids_CM: Tensor, top_k: int = 0, entropy: bool = False, top_rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Peaks, dict[str, Tensor]]:
        """Logits at the wanted ids, log sum exp z, the peaks, and on request the likeliest tokens (of some rows:
        `top_rows`) and the entropy.

        H = L + sum_j exp(L_j - L) (H_j - L_j).
        """
        wide = torch.promote_types(self.hidden_CH.dtype, torch.float32)
        wanted_CM = self.hidden_CH.new_zeros(ids_CM.shape, dtype=wide)
        log_sums, entropies, best, high = [], [], None, []
        pool = top_k + (NUM_PEAKS + 1 if has_peaks(self.hidden_CH.dtype) else 0)
        for part in self.parts:
            z_Cv = self.logits(part)
            wanted_CM = torch.where(*_within(z_Cv, ids_CM - part.start), wanted_CM)
            if top_k:
                ids_CK, z_CK = likeliest(z_Cv, min(pool, z_Cv.shape[1]), rows_N=top_rows)
                best = _merged(best, (ids_CK + part.start, z_CK), pool)
            if has_peaks(z_Cv.dtype):
                ids_CE = largest(z_Cv, min(NUM_PEAKS, z_Cv.shape[1]))
                high.append((ids_CE + part.start, z_Cv.gather(1, ids_CE)))
            log_sum_C, entropy_C = log_sum_exp(z_Cv, entropy)
            log_sums.append(log_sum_C)
            entropies.append(entropy_C)
        log_sums_CJ = torch.stack(log_sums, 1)
        rounded_C = log_sums_CJ.logsumexp(1)
        peaks = self._peaks(ids_CM, wanted_CM, high)
        log_sum_C = peaks.log_sum(rounded_C)
        extra = {}
        if best is not None:
            theirs = peaks if top_rows is None else peaks.rows(top_rows)
            extra["topk_ids"], extra["topk"] = theirs.best(*best, top_k)
        if entropy:
            share_CJ = (log_sums_CJ - rounded_C[:, None]).exp()
            rest_CJ = torch.stack(entropies, 1) - log_sums_CJ
            entropy_C = rounded_C + torch.where(share_CJ > 0, share_CJ * rest_CJ, 0.0).sum(1)
            extra["entropy"] = peaks.entropy(entropy_C, rounded_C, log_sum_C)
        return peaks.patch(ids_CM, wanted_CM), log_sum_C, peaks, extra

    def _peaks(self, ids_CM: Tensor, wanted_CM: Tensor, high: list[tuple[Tensor, Tensor]]) -> Peaks:
        """The peaks of the whole vocabulary, from the largest logits of its parts."""
        if not high:
            none = wanted_CM[:, :0]
            return Peaks(ids_CM[:, :0], none, none)
        ids_CA, z_CA = (torch.cat(columns, 1) for columns in zip(*high, strict=True))
        chosen_CE = largest(z_CA, min(NUM_PEAKS, z_CA.shape[1]))
        ids_CE = torch.cat([ids_CM[:, :1], ids_CA.gather(1, chosen_CE)], 1)
        rounded_CE = torch.cat([wanted_CM[:, :1], z_CA.gather(1, chosen_CE).to(wanted_CM.dtype)], 1)
        exact = partial(products_at, self.hidden_CH, self.weight_VH, self.bias_V, self.scale)
        return make_peaks(ids_CE, rounded_CE, exact)

    def descend(self, rows: slice, log_sum_C: Tensor, peaks: Peaks, dense_C: Tensor, sums: Gradients) -> None:
        """The dense gradient without the peaks: diag(a) p W into d h, p^T diag(a) h into d W, p^T a into d b."""
        wide, narrow = sums.hidden_NH.dtype, self.hidden_CH.dtype
        pulled_CH = (self.hidden_CH.to(wide) * dense_C[:, None]).to(narrow)
        gradient_CH = sums.hidden_NH[rows].zero_()
        for part in reversed(self.parts):
            p_Cv = self.logits(part)
            exponentials_(p_Cv, log_sum_C)
            self.held = None
            without_(p_Cv, peaks.ids_CE - part.start)
            add_product_(gradient_CH, p_Cv, self.weight_VH[part])
            if sums.weight_VH is not None:
                add_product_(sums.weight_VH[part], p_Cv.t(), pulled_CH, first=rows.start == 0)
            if sums.bias_V is not None:
                sums.bias_V[part] += torch.mv(p_Cv.t(), dense_C.to(narrow))
        gradient_CH.mul_(dense_C[:, None])


class _Lean(Fused):
    """`Fused` with another forward; the backward is the same."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, work: TileWork) -> Tensor:
        assert work.tile_vocab is not None
        sums = Gradients(hidden_NH, weight_VH, bias_V, ctx.needs_input_grad)
        losses, buffer = [], _buffer(hidden_NH, weight_VH, work.tile_tokens, work.tile_vocab)
        for rows in tiles(hidden_NH.shape[0], work.tile_tokens):
            visit = _Visit(hidden_NH[rows], weight_VH, bias_V, work.scale, work.tile_vocab, buffer)
            losses.append(_tile(rows, visit, work, sums))
        sums.save(ctx, hidden_NH.dtype, weight_VH.dtype)
        return torch.stack(losses).sum()


def _tile(rows: slice, visit: _Visit, work: TileWork, sums: Gradients) -> Tensor:
    """One tile of tokens: read, take the loss, and add its gradients."""
    ids_CM = work.ids_NM[rows]
    looked = None if work.own is None else work.own.of(rows)
    top_k = 0 if work.own is None else work.own.top_k
    wanted_CM, log_sum_C, peaks, extra = visit.read(ids_CM, top_k=top_k, top_rows=looked)
    if work.own is not None and looked is not None:
        work.own.put(rows, looked, extra["topk_ids"])
    logprobs_CM = (wanted_CM - log_sum_C[:, None]).requires_grad_()
    with torch.enable_grad():
        loss = work.loss_of(rows, logprobs_CM)
    (c_CM,) = torch.autograd.grad(loss, logprobs_CM)
    c_CM = c_CM * work.scale
    dense_C, hidden_wide = -c_CM.sum(1), visit.hidden_CH.to(sums.hidden_NH.dtype)
    visit.descend(rows, log_sum_C, peaks, dense_C, sums)
    add_sparse(rows, hidden_wide, visit.weight_VH, ids_CM, c_CM, sums)
    add_peaks(rows, hidden_wide, visit.weight_VH, peaks, log_sum_C, dense_C, sums)
    return loss.detach()


def exponentials_(z_CV: Tensor, log_sum_C: Tensor) -> None:
    """In place z <- exp(z - L), in float32 at least."""
    if kernels := kernels_for(z_CV):
        return kernels.exponentials_(z_CV, log_sum_C)
    for part, x_rV in wide_rows(z_CV, keep=False):
        x_rV.sub_(log_sum_C[part, None]).exp_()


def without_(p_Cv: Tensor, ids_CE: Tensor) -> None:
    """In place p <- 0 at those ids, counted from the tile's first, that lie in the tile."""
    inside_CE = (ids_CE >= 0) & (ids_CE < p_Cv.shape[1])
    rows, columns = inside_CE.nonzero(as_tuple=True)
    p_Cv[rows, ids_CE[rows, columns]] = 0.0


def _buffer(hidden_NH: Tensor, weight_VH: Tensor, tile_tokens: int, tile_vocab: int) -> Tensor:
    return hidden_NH.new_empty(min(tile_tokens, len(hidden_NH)) * min(tile_vocab, weight_VH.shape[0]))


def _within(z_Cv: Tensor, ids_CM: Tensor) -> tuple[Tensor, Tensor]:
    """Which ids, counted from the tile's first, lie in the tile, and their logits (any number for the others)."""
    inside_CM = (ids_CM >= 0) & (ids_CM < z_Cv.shape[1])
    read_CM = z_Cv.gather(1, ids_CM.clamp(0, z_Cv.shape[1] - 1))
    return inside_CM, read_CM.to(torch.promote_types(z_Cv.dtype, torch.float32))


def _merged(before: tuple[Tensor, Tensor] | None, new: tuple[Tensor, Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """The likeliest of both, equal ones by id: earlier tiles hold smaller ids, and the sort is stable."""
    if before is None:
        return new
    ids_CK, z_CK = torch.cat([before[0], new[0]], 1), torch.cat([before[1], new[1]], 1)
    z_CK, order_CK = z_CK.sort(dim=1, descending=True, stable=True)
    return ids_CK.gather(1, order_CK[:, :top_k]), z_CK[:, :top_k]


def _check(ids_NM: Tensor, tile_vocab: int, vocab_size: int) -> None:
    """Refuse ids outside the vocabulary: no tile holds them, and no gather would raise an error."""
    if tile_vocab < 1:
        raise ConfigError(
            f"tile_vocab = {tile_vocab} was asked for, but a tile holds at least one of the {vocab_size} tokens of the "
            "vocabulary. Give 1 or more (16384, say), or None for the whole vocabulary at once."
        )
    if not ids_NM.numel():
        return
    lowest, highest = (int(x) for x in ids_NM.aminmax())
    if lowest < 0 or highest >= vocab_size:
        raise VocabularyError(
            f"log-probabilities of the tokens {lowest} to {highest} were asked for, but the student's vocabulary has "
            f"the tokens 0 to {vocab_size - 1}. Drop ignored positions and tokens that only the teacher has."
        )
