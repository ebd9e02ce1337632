"""When an engine's steps have a fixed shape: if that is wanted, and a probe finds the same logits."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tropd.model import hf
from tropd.model.head import differ
from tropd.rollout.cache import RowCache
from tropd.rollout.slots import SlotCache

_KEPT_SHARE = 0.1
"""Largest share of a GPU's memory that a key-value cache may keep between batches."""


class Reader(Protocol):
    """What this module needs of an engine."""

    model: nn.Module
    vocab_size: int

    def last_logits(self, input_ids_BT: Tensor, mask: Any, positions_BT: Tensor, cache: hf.Cache) -> Tensor: ...


class FixedShapes:
    """The cache for steps of fixed shape.  `wanted` None: only on CUDA, where such steps can be recorded."""

    def __init__(self, wanted: bool | None) -> None:
        self.wanted = wanted
        self.slots: SlotCache | None = None

    def cache_for(self, engine: Reader, base: Any) -> SlotCache | None:
        """The cache; None if the steps' shapes follow the rows."""
        weight = next(engine.model.parameters())
        if not (weight.device.type == "cuda" if self.wanted is None else self.wanted):
            return None
        if self.slots is not None and (self.slots.device, self.slots.dtype) == (weight.device, weight.dtype):
            return self.slots
        windows = hf.windows_of(base)
        slots = SlotCache(weight.device, weight.dtype, windows)
        problem: Exception | str = "its masks are its own"
        try:
            if windows:
                plain, fixed = _probe(engine, slots)
                if not bool(plain.isfinite().all()):  # the caller is about to refuse the model's logits
                    return None
                if not differ(fixed, plain):
                    self.slots = slots
                    return slots
                problem = "it gives other logits then"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a release that takes masks otherwise may raise
            problem = error
        self.wanted, self.slots = False, None
        hf.step_aside(f"{type(base).__name__} is not stepped in fixed shapes, nor recorded as CUDA graphs,", problem)
        return None

    def give_back(self) -> bool:
        """After a call of generate, free the buffers unless they are small for the device; whether they were freed."""
        slots = self.slots
        if slots is None or slots.device.type != "cuda":
            return False
        if slots.num_bytes <= _KEPT_SHARE * torch.cuda.get_device_properties(slots.device).total_memory:
            return False
        slots.release()
        return True


def _probe(engine: Reader, slots: SlotCache) -> tuple[Tensor, Tensor]:
    """The logits of a few steps on texts of two lengths, with the flexible cache and with this one."""
    lengths, width, device = [8, 5], 8, slots.device
    ids_BT = torch.arange(2 * width, device=device).view(2, width) % engine.vocab_size
    positions_BT = torch.arange(width, device=device) - (width - torch.tensor(lengths, device=device))[:, None]
    prefilled = hf.DynamicCache()
    engine.last_logits(ids_BT, (positions_BT >= 0).long(), positions_BT.clamp(min=0), prefilled)
    logits: list[Tensor] = []
    for cache in (RowCache(), slots):
        source = [0, 1, 0, 1, 1]
        cache.admit(prefilled, source, [lengths[i] for i in source], len(source))
        for _ in range(2):
            cache.reserve(len(source))
            ids_B1 = torch.arange(len(source), device=device)[:, None] % engine.vocab_size
            loaded = cache.load(ids_B1)
            logits.append(engine.last_logits(loaded, cache.mask(), cache.positions(), cache)[: len(source)])
            cache.advance()
    slots.release()
    return torch.cat(logits[:2]), torch.cat(logits[2:])
