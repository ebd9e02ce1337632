"""A key-value cache of fixed shape, for steps that are recorded once and replayed (`tropd.rollout.graphs`).

    slot 0    k k k k k k . . . . . .     one buffer per layer: [slots, heads, capacity, width]
    slot 1    . . k k k . . . . . . .     a row lies in the columns [start, end) of its slot
    slot 2    k k k k k k k k k . . .     and its next token is written to column `end`
    slot 3    . . . . . . . . . . . .     free

A step reads the first R slots and the first C columns, both rounded up to a few sizes.  All that changes from step to
step is numbers in tensors: last tokens, starts and ends.  So a step of one shape always runs the same operations
on the same addresses.  Columns outside a row are masked; slots beyond the live rows compute unused results.

Axes: B live rows, R slots that are read, C columns that are read, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model import hf
from tropd.model.hf import Cache, DynamicCache, DynamicLayer
from tropd.rollout.cache import compaction

_FEWEST_COLUMNS = 128
_IDS, _STARTS, _ENDS = range(3)


def rounded_up(number: int, fewest: int = 1) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: at most half as much again, and few sizes."""
    size = 1 << (max(number, fewest, 1) - 1).bit_length()
    return 3 * size // 4 if size >= 4 and 3 * size // 4 >= max(number, fewest) else size


class SlotLayer(DynamicLayer):
    """One layer's keys and values."""

    def __init__(self, cache: SlotCache, like: DynamicLayer) -> None:
        super().__init__()
        assert like.keys is not None and like.values is not None
        self.dtype, self.device, self.is_initialized = like.keys.dtype, like.keys.device, True
        self.cache = cache
        self.buffers = [x.new_zeros(0, x.shape[1], 0, x.shape[3]) for x in (like.keys, like.values)]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write each row's next column; returns all columns that the step reads."""
        num_rows, num_columns = self.cache.shape
        ends_R = self.cache.inputs_3S[_ENDS, :num_rows]
        rows_R = torch.arange(num_rows, device=ends_R.device)
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows_R, :, ends_R] = states[:, :, 0]
        self.keys, self.values = (buffer[:num_rows, :, :num_columns] for buffer in self.buffers)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.cache.shape[1], 0

    def get_seq_length(self) -> int:
        return self.cache.shape[1] - 1

    def grow(self, slots: int, capacity: int) -> None:
        for i, old in enumerate(self.buffers):
            new = old.new_zeros(slots, old.shape[1], capacity, old.shape[3])
            new[: old.shape[0], :, : old.shape[2]] = old
            self.buffers[i] = new

    def write(self, first_row: int, prefilled: DynamicLayer, source_B: Tensor) -> None:
        for buffer, states in zip(self.buffers, (prefilled.keys, prefilled.values), strict=True):
            assert states is not None
            buffer[first_row : first_row + len(source_B), :, : states.shape[2]] = states.index_select(0, source_B)

    def move(self, source_B: Tensor, target_B: Tensor, num_columns: int) -> None:
        for buffer in self.buffers:
            buffer[target_B, :, :num_columns] = buffer[source_B, :, :num_columns]


class SlotCache(Cache):
    """The cache of a batch that shrinks and is refilled, like `RowCache`, but at fixed addresses.

    `windows`: how far back each kind of layer looks (`tropd.model.hf.windows_of`).
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, windows: dict[str, int | None]) -> None:
        super().__init__(layers=[])
        self.device, self.dtype, self.windows = device, dtype, windows
        self.inputs_3S = torch.zeros(3, 0, dtype=torch.long, device=device)
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.capacity = 0
        self.generation = 0
        """How often the buffers have moved."""

    @property
    def shape(self) -> tuple[int, int]:
        """Slots and columns that a step reads."""
        return rounded_up(len(self.starts)), rounded_up(max(self.ends, default=0) + 1, _FEWEST_COLUMNS)

    @property
    def num_slots(self) -> int:
        return self.inputs_3S.shape[1]

    @property
    def num_bytes(self) -> int:
        return sum(b.numel() * b.element_size() for layer in self._slot_layers for b in layer.buffers)

    def clear(self) -> None:
        """Remove all rows and keep the buffers, set to zero: 0 * NaN would not be zero."""
        self.starts, self.ends = [], []
        for layer in self._slot_layers:
            for buffer in layer.buffers:
                buffer.zero_()

    def release(self) -> None:
        """Free the buffers' memory."""
        self.starts, self.ends = [], []
        self.layers, self.inputs_3S, self.capacity = [], self.inputs_3S[:, :0], 0

    def admit(self, prefilled: DynamicCache, source: Sequence[int], lengths: Sequence[int], rows: int) -> None:
        """Append one row for each entry of `source`, a row of a left-padded prefill.  Room is made for `rows` rows."""
        filled = hf.layers_of(prefilled)
        if not self.layers:
            self.layers = [SlotLayer(self, like) for like in filled]
        width, first_row = prefilled.get_seq_length(), len(self.starts)
        self._make_room(max(rows, first_row + len(source)), width + 1)
        self.starts += [width - length for length in lengths]
        self.ends += [width] * len(source)
        source_B = torch.tensor(source, device=self.device)
        for layer, states in zip(self._slot_layers, filled, strict=True):
            layer.write(first_row, states, source_B)

    def keep(self, alive: Sequence[int]) -> list[int]:
        """Let the other rows go: the last rows move into their places.  Gives the old index of each row left."""
        order, movers, holes = compaction(alive)
        if movers:
            source_B, target_B = (torch.tensor(x, device=self.device) for x in (movers, holes))
            for layer in self._slot_layers:
                layer.move(source_B, target_B, max(self.ends[row] for row in movers))
        self.starts, self.ends = ([at[row] for row in order] for at in (self.starts, self.ends))
        return order

    def reserve(self, rows: int) -> None:
        """Room for one more column of each row."""
        self._make_room(rows, max(self.ends) + 1)

    def advance(self) -> None:
        """Every layer has written one column of each row."""
        self.ends = [end + 1 for end in self.ends]

    def load(self, last_ids_B1: Tensor) -> Tensor:
        """Write a step's inputs into its tensors; returns the tokens to feed, [R, 1]."""
        TAKEN.add(FastPath.FIXED_SHAPES)
        num_rows = self.shape[0]
        spare = [0] * (num_rows - len(self.starts))
        self.inputs_3S[_STARTS:, :num_rows].copy_(torch.tensor([self.starts + spare, self.ends + spare]))
        self.inputs_3S[_IDS, : len(last_ids_B1)] = last_ids_B1[:, 0]
        return self.inputs_3S[_IDS, :num_rows, None]

    def positions(self) -> Tensor:
        """The position of the new column in each row, [R, 1]."""
        _, starts_R, ends_R = self._inputs()
        return (ends_R - starts_R)[:, None]

    def looks(self, window: int | None = None) -> Tensor:
        """Where each row may attend, the new column included, [R, C]."""
        _, starts_R, ends_R = self._inputs()
        columns_C = torch.arange(self.shape[1], device=self.device)
        looks_RC = (columns_C >= starts_R[:, None]) & (columns_C <= ends_R[:, None])
        return looks_RC if window is None else looks_RC & (columns_C > ends_R[:, None] - window)

    def mask(self) -> Tensor | dict[str, Tensor]:
        """The additive mask [R, 1, 1, C] for the model's forward: a single one, or one per kind of layer."""
        if "" in self.windows:
            return self._added(self.windows[""])
        return {kind: self._added(window) for kind, window in self.windows.items()}

    def _added(self, window: int | None) -> Tensor:
        looks_RC = self.looks(window)
        added_RC = torch.zeros(looks_RC.shape, dtype=self.dtype, device=self.device)
        return added_RC.masked_fill_(~looks_RC, torch.finfo(self.dtype).min)[:, None, None]

    def _inputs(self) -> Tensor:
        return self.inputs_3S[:, : self.shape[0]]

    def _make_room(self, rows: int, columns: int) -> None:
        if rows <= self.num_slots and columns <= self.capacity:
            return
        if self.starts:
            TAKEN.add(FastPath.GROWN_CACHE)
        slots = max(self.num_slots, rounded_up(rows))
        self.capacity = max(self.capacity, rounded_up(columns, _FEWEST_COLUMNS))
        self.generation += 1
        self.inputs_3S = torch.zeros(3, slots, dtype=torch.long, device=self.device)
        for layer in self._slot_layers:
            layer.grow(slots, self.capacity)

    @property
    def _slot_layers(self) -> list[SlotLayer]:
        return [layer for layer in self.layers if isinstance(layer, SlotLayer)]
