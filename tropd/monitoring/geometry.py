"""How an update moves the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tropd.monitoring.probe import Numbers, Probe, Weight


class Geometry(Probe):
    """After "On the Geometry of On-Policy Distillation" (arXiv:2606.07082), of each update instead of the whole run:

        geometry/unchanged_bf16   share of the weights whose value in bfloat16 an update leaves as it was
        geometry/moved            sum |after - before| / sum |before|

    Both are estimates from the same random `entries` of each tensor, all of a smaller one, so that no second copy of
    the weights is kept.
    """

    name = "geometry"

    def __init__(self, entries: int = 65536) -> None:
        self.places = torch.rand(entries, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        self.before: dict[str, Tensor] = {}

    def before_update(self, weights: Mapping[str, Weight]) -> Numbers:
        self.before = {name: self._chosen(weight.value) for name, weight in weights.items()}
        return {}

    def after_update(self, weights: Mapping[str, Weight]) -> Numbers:
        unchanged = moved = size = number = 0.0
        for name, before in self.before.items():
            after, num_entries = self._chosen(weights[name].value), weights[name].value.numel()
            each = num_entries / max(len(before), 1)
            unchanged += each * float((before.bfloat16() == after.bfloat16()).sum())
            moved += each * float((after - before).abs().sum())
            size += each * float(before.abs().sum())
            number += num_entries
        self.before = {}
        return {"unchanged_bf16": (unchanged, number), "moved": (moved, size)}

    def _chosen(self, value: Tensor) -> Tensor:
        flat = value.reshape(-1)
        if len(flat) <= len(self.places):
            return flat.float().clone()
        return flat[(self.places * len(flat)).long().to(flat.device)].float()
