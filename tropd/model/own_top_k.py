"""The student's likeliest tokens of some rows, read off the tiles of the pass that trains, for probes.

The tile holds the whole row already, so no pass is added; nothing of the tile is changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tropd.model.likeliest import likeliest
from tropd.model.peaks import Peaks


class OwnTopK:
    """Filled tile by tile: ids [N, K], likeliest first, and -1 in the rows that are not looked at."""

    def __init__(self, rows_N: Tensor, top_k: int) -> None:
        self.rows_N, self.top_k = rows_N, top_k
        self.ids_NK = torch.full((len(rows_N), top_k), -1, dtype=torch.int64, device=rows_N.device)

    def of(self, rows: slice) -> Tensor:
        """Which rows of a tile are looked at, counted from the tile's first."""
        return self.rows_N[rows].nonzero().flatten()

    def put(self, rows: slice, chosen: Tensor, ids_nK: Tensor) -> None:
        self.ids_NK[rows.start + chosen] = ids_nK

    @torch.no_grad()
    def look(self, rows: slice, logits_CV: Tensor, peaks: Peaks | None = None) -> None:
        """`logits_CV` up to a constant in each row; `peaks` are its exact ones."""
        chosen = self.of(rows)
        if not len(chosen):
            return
        if peaks is None:
            ids_nK, _ = likeliest(logits_CV, self.top_k, rows_N=chosen)
        else:
            pool = peaks.pool(self.top_k, logits_CV.shape[1])
            ids_nK, _ = peaks.rows(chosen).best(*likeliest(logits_CV, pool, rows_N=chosen), self.top_k)
        self.put(rows, chosen, ids_nK)
