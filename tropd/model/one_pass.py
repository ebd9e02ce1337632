"""The head in one visit of the vocabulary: what learners, teachers and plans call.

fused_loss   loss and gradient, formed while a tile of logits is in cache (`tropd.model.fused`)
read_rows    log-probabilities, entropy and top-k without a gradient
`tile_vocab` tiles the vocabulary too, for a workspace that does not grow with it (`tropd.model.lean`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.fused import Fused, TileWork, log_sum_exp, logits_of, matrix_of
from tropd.model.head import Head, tiles
from tropd.model.lean import lean_loss, lean_rows
from tropd.model.likeliest import column_maxima, likeliest
from tropd.model.own_top_k import OwnTopK
from tropd.model.parts import TileLoss
from tropd.model.peaks import Peaks, find_peaks, has_peaks, is_matrix, products_at
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.support import NOTHING
from tropd.types import READER

TopRows = Callable[[slice, Tensor], Tensor]
"""(rows, log-probabilities of their written tokens) -> for which of them the top-k is wanted."""


def wanted(tokens: Tokens, needs: Needs | Mapping[str, Needs]) -> tuple[Tensor, Callable[[Tensor], StudentView]]:
    """Which tokens of each row an objective reads, and how log-probabilities there make a view.  `needs` are those of
    the reader "teacher", or of each reader by its name."""
    asks = {READER: needs} if isinstance(needs, Needs) else needs
    readers = [name for name, asked in asks.items() if Needs.TOPK in asked]
    columns = [tokens.token_ids_N[:, None], *(tokens.of(name).teacher_topk_ids_NK for name in readers)]
    own = any(Needs.STUDENT_TOPK in asked for asked in asks.values())
    if own:
        columns.append(tokens.student_topk_ids_NJ)
    device, widths = tokens.token_ids_N.device, [column.shape[1] for column in columns]

    def view_of(logprobs_CM: Tensor) -> StudentView:
        parts = list(logprobs_CM.split(widths, dim=1))
        view = StudentView(logprobs_N=parts.pop(0).squeeze(1))
        for name in readers:
            view = view.told(name, topk_logprobs_NK=parts.pop(0))
        return view.with_(student_topk_logprobs_NJ=parts.pop(0)) if own else view

    return torch.cat([column.to(device) for column in columns], dim=1), view_of


def can_fuse(head: Head) -> bool:
    """Whether the head is a plain matrix, perhaps scaled: no adapter, no hooks, no soft-capping."""
    return is_matrix(head.module) and head.softcap is None


def fused_loss(
    head: Head,
    hidden_NH: Tensor,
    ids_NM: Tensor,
    loss_of: TileLoss,
    tile_tokens: int,
    tile_vocab: int | None = None,
    own: OwnTopK | None = None,
) -> Tensor:
    """The loss of all rows, with its gradient already formed.  Call it only where a gradient is wanted.

    `tile_vocab` trades one more matrix product for a workspace that does not grow with V (`tropd.model.lean`).
    `own` is filled on the way.
    """
    if tile_vocab is not None:
        return lean_loss(head, hidden_NH, ids_NM, loss_of, tile_tokens, tile_vocab, own)
    TAKEN.add(FastPath.FUSED_HEAD)
    weight, bias, scale = matrix_of(head)
    work = TileWork(ids_NM=ids_NM, loss_of=loss_of, tile_tokens=tile_tokens, scale=scale, own=own)
    return Fused.apply(hidden_NH, weight, bias, work)


@torch.no_grad()
def read_rows(
    head: Head,
    hidden_NH: Tensor,
    ids_NM: Tensor,
    tile_tokens: int,
    *,
    top_k: int = 0,
    entropy: bool = False,
    tile_vocab: int | None = None,
    top_rows: TopRows | None = None,
) -> dict[str, Tensor]:
    """What `Head.read` gives without a gradient, from one visit of the vocabulary per tile.

    Rows that `top_rows` leaves out hold NOTHING as their top-k; objectives refuse to read it.
    """
    if tile_vocab is not None:
        return lean_rows(head, hidden_NH, ids_NM, tile_tokens, tile_vocab, top_k=top_k, entropy=entropy)
    TAKEN.add(FastPath.FUSED_READ)
    weight, bias, scale = matrix_of(head)
    found = []
    buffer_CV = hidden_NH.new_empty(min(tile_tokens, max(len(hidden_NH), 1)), head.vocab_size)
    for rows in tiles(len(hidden_NH), tile_tokens):
        hidden_CH, ids_CM = hidden_NH[rows], ids_NM[rows]
        z_CV = logits_of(hidden_CH, weight, bias, scale, buffer_CV)
        maxima_CW = column_maxima(z_CV) if has_peaks(z_CV.dtype) else None
        peaks = find_peaks(z_CV, ids_CM[:, 0], partial(products_at, hidden_CH, weight, bias, scale), maxima_CW)
        rounded_C, entropy_C = log_sum_exp(z_CV, entropy, peaks.highest_C)
        log_sum_C = peaks.log_sum(rounded_C)
        part = {"log_z": log_sum_C[:, None]}
        part["at"] = peaks.patch(ids_CM, z_CV.gather(1, ids_CM)) - log_sum_C[:, None]
        if top_k:
            chosen_C = None if top_rows is None else top_rows(rows, part["at"][:, 0])
            part["topk_ids"], part["topk"] = _top(z_CV, maxima_CW, peaks, log_sum_C, top_k, chosen_C)
        if entropy:
            part["entropy"] = peaks.entropy(entropy_C, rounded_C, log_sum_C)
        found.append(part)
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def _top(
    z_CV: Tensor, maxima_CW: Tensor | None, peaks: Peaks, log_sum_C: Tensor, top_k: int, chosen_C: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Ids and log-probabilities of the likeliest tokens, for the chosen rows only."""
    pool = peaks.pool(top_k, z_CV.shape[1])
    if chosen_C is None or bool(chosen_C.all()):
        ids_CK, logits_CK = peaks.best(*likeliest(z_CV, pool, maxima_CW), top_k)
        return ids_CK, logits_CK - log_sum_C[:, None]
    TAKEN.add(FastPath.SOME_TOP_K)
    ids_CK = z_CV.new_zeros((len(z_CV), top_k), dtype=torch.int64)
    logprobs_CK = log_sum_C.new_full((len(z_CV), top_k), NOTHING)
    rows = chosen_C.nonzero().flatten()
    if len(rows):
        ids_CK[rows], logits = peaks.rows(rows).best(*likeliest(z_CV, pool, maxima_CW, rows), top_k)
        logprobs_CK[rows] = logits - log_sum_C[rows, None]
    return ids_CK, logprobs_CK
