"""What a run remembers from step to step: named tensors, small, and the same on all ranks.

They change once per step, after the plan, never in a micro-batch.  Checkpoints hold them; `tropd inspect` shows them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from tropd.errors import CheckpointError


class Memory(dict[str, Tensor]):
    """Tensors by name; a name begins with whose it is, such as `follow.default/reward`: OWNER/NAME."""

    def put(self, name: str, number: float | int) -> None:
        """A whole number in 64 bits, any other in float64."""
        self[name] = torch.tensor(number, dtype=torch.int64 if isinstance(number, int) else torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """As JSON has it, which keeps every number to the last bit."""
        return {name: {"dtype": str(x.dtype).removeprefix("torch."), "values": x.tolist()} for name, x in self.items()}

    def number(self, name: str, default: float) -> float:
        """A number that was put there, or else the default."""
        return float(self[name]) if name in self else default

    def check_owners(self, owners: Collection[str]) -> None:
        """Refuse what belongs to nobody of this run: a checkpoint of another method."""
        if strange := [name for name in self if name.rpartition("/")[0] not in owners]:
            there = ", ".join(sorted(owners)) or "nothing"
            raise CheckpointError(
                f"the checkpoint remembers {strange[0]!r}, but nothing in this run has that memory (it has: {there}). "
                "The checkpoint belongs to another method or another policy."
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clear()
        for name, x in state.items():
            self[name] = torch.tensor(x["values"], dtype=getattr(torch, x["dtype"]))
