"""The key-value cache of generation, for rows that enter and leave.

    column      0 . . first . . . . . end . . capacity        one buffer per layer: [rows, heads, capacity, width]
    row 0               k k k k k k k k                       every row ends at column `end`: left padding
    row 1                     k k k k k                       a row's start is the column of its first token
    row 2               k k k k k k k k

The model sees columns [first, end) of the live rows.  A row that leaves costs one copy of the last row into its place;
a row that enters is written so that it ends at `end`.  `first` is the smallest start of the live rows, so the model
never reads more columns than its longest live row has tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model import hf
from tropd.model.hf import Cache, DynamicCache, DynamicLayer

_MIN_SLACK = 64
_SLACK_SHARE = 8
"""Free columns of a new buffer: at least 64 and an eighth of those in use, so that growing costs little per token."""


@dataclass(slots=True)
class Columns:
    """The columns of the live rows in the buffers; shared by all layers."""

    first: int = 0
    end: int = 0
    starts: list[int] = field(default_factory=list)

    @property
    def num_rows(self) -> int:
        return len(self.starts)


class RowLayer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self, columns: Columns, like: DynamicLayer) -> None:
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self.columns = columns
        self.buffers = [x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write column `end`; give all columns of the live rows.  `RowCache.advance` moves on after the last layer."""
        at = self.columns
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[: at.num_rows, :, at.end : at.end + 1] = states
        self.keys, self.values = (b[: at.num_rows, :, at.first : at.end + 1] for b in self.buffers)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        return self.get_seq_length() + hf.query_length(query_length), 0

    def get_seq_length(self) -> int:
        return self.columns.end - self.columns.first

    def relayout(self, rows: int, capacity: int, end: int) -> None:
        """Move the live part into new buffers, where it ends at column `end`."""
        at = self.columns
        for i, old in enumerate(self.buffers):
            # Zeros, not empty: padding has weight zero in attention, but 0 * NaN would not be zero.
            new = old.new_zeros(rows, old.shape[1], capacity, old.shape[3])
            new[: at.num_rows, :, end - (at.end - at.first) : end] = old[: at.num_rows, :, at.first : at.end]
            self.buffers[i] = new

    def write(self, first_row: int, prefilled: DynamicLayer, source_R: Tensor) -> None:
        at = self.columns
        for buffer, states in zip(self.buffers, (prefilled.keys, prefilled.values), strict=True):
            assert states is not None
            rows = slice(first_row, first_row + len(source_R))
            buffer[rows, :, at.end - states.shape[2] : at.end] = states.index_select(0, source_R)

    def move(self, source_R: Tensor, target_R: Tensor) -> None:
        at = self.columns
        for buffer in self.buffers:
            buffer[target_R, :, at.first : at.end] = buffer[source_R, :, at.first : at.end]


class RowCache(Cache):
    """The cache of a batch that shrinks and is refilled.  Starts empty; `admit` brings rows in."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.columns = Columns()
        self._starts_B: Tensor | None = None

    def admit(self, prefilled: DynamicCache, source: Sequence[int], lengths: Sequence[int], rows: int) -> None:
        """Append one row for each entry of `source`, a row of a left-padded prefill.  Room is made for `rows` rows."""
        if not self.layers:
            self.layers = [RowLayer(self.columns, like) for like in hf.layers_of(prefilled)]
        at, first_row = self.columns, self.columns.num_rows
        self.reserve(max(rows, first_row + len(source)), width=prefilled.get_seq_length())
        at.starts.extend(at.end - length for length in lengths)
        source_R = torch.tensor(source, device=self._row_layers[0].device)
        for layer, states in zip(self._row_layers, hf.layers_of(prefilled), strict=True):
            layer.write(first_row, states, source_R)
        self._settle()

    def keep(self, alive: Sequence[int]) -> list[int]:
        """Let the other rows go: the last rows move into their places.  Gives the old index of each row left."""
        order, movers, holes = compaction(alive)
        if movers:
            device = self._row_layers[0].device
            source_R, target_R = torch.tensor(movers, device=device), torch.tensor(holes, device=device)
            for layer in self._row_layers:
                layer.move(source_R, target_R)
        self.columns.starts = [self.columns.starts[row] for row in order]
        self._settle()
        return order

    def reserve(self, rows: int, width: int = 0) -> None:
        """Room for `rows` rows, for `width` columns up to `end`, and for one more column."""
        at, buffer = self.columns, self._row_layers[0].buffers[0]
        if rows <= buffer.shape[0] and width <= at.end < buffer.shape[2]:
            return
        if at.starts:
            TAKEN.add(FastPath.GROWN_CACHE)
        end = max(at.end - at.first, width)
        capacity = end + max(_MIN_SLACK, end // _SLACK_SHARE)
        for layer in self._row_layers:
            layer.relayout(rows, capacity, end)
        at.starts = [start + end - at.end for start in at.starts]
        at.end = end
        self._settle()

    def advance(self) -> None:
        """Every layer has written column `end`."""
        self.columns.end += 1

    def load(self, last_ids_B1: Tensor) -> Tensor:
        """The tokens to feed.  Here they stay as they are, because the cache's shape follows the rows."""
        return last_ids_B1

    def looks(self) -> Tensor | None:
        """1 where a row may attend, the new column included, [B, columns]; None if every row may attend everywhere."""
        at = self.columns
        if all(start == at.first for start in at.starts):
            return None
        starts_B = self._starts()
        return (torch.arange(at.first, at.end + 1, device=starts_B.device) >= starts_B[:, None]).long()

    def mask(self) -> Tensor | None:
        """The same, in the form that the model's forward takes."""
        return self.looks()

    def positions(self) -> Tensor:
        """The position of the new column in each row, [B, 1]."""
        return self.columns.end - self._starts()[:, None]

    @property
    def _row_layers(self) -> list[RowLayer]:
        return [layer for layer in self.layers if isinstance(layer, RowLayer)]

    def _starts(self) -> Tensor:
        if self._starts_B is None:
            self._starts_B = torch.tensor(self.columns.starts, device=self._row_layers[0].device)
        return self._starts_B

    def _settle(self) -> None:
        self.columns.first = min(self.columns.starts, default=self.columns.end)
        self._starts_B = None


def compaction(alive: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """How rows move together: the old index of each row that is left, and which rows move into which places."""
    order = list(range(len(alive)))
    holes = sorted(set(order) - set(alive))
    movers = [row for row in alive if row >= len(alive)]
    for hole, mover in zip(holes, movers, strict=True):
        order[hole] = mover
    return order, movers, holes
