"""What a run remembers from step to step: named tensors, small, and the same on all ranks.

They change once per step, after the plan, never in a micro-batch.  Checkpoints hold them; `tropd inspect` shows them.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
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

    def write(self, name: str, text: str) -> None:
        """A text, as bytes."""
        self[name] = as_bytes(text)

    def read(self, name: str) -> str:
        """A text that was written there."""
        return read_bytes(self[name])

    def state_dict(self) -> dict[str, Any]:
        """As JSON has it, which keeps every number to the last bit."""
        return {name: _packed(x) for name, x in self.items()}

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
            if "bytes" in x:
                self.write(name, b64decode(x["bytes"]).decode())
            else:
                self[name] = torch.tensor(x["values"], dtype=getattr(torch, x["dtype"]))


def as_bytes(text: str) -> Tensor:
    content = bytearray(text.encode())
    return torch.frombuffer(content, dtype=torch.uint8) if content else torch.zeros(0, dtype=torch.uint8)


def read_bytes(x: Tensor) -> str:
    return x.numpy().tobytes().decode()


def _packed(x: Tensor) -> dict[str, Any]:
    if x.dtype == torch.uint8 and x.dim() == 1:  # a text
        return {"dtype": "uint8", "bytes": b64encode(x.numpy().tobytes()).decode()}
    return {"dtype": str(x.dtype).removeprefix("torch."), "values": x.tolist()}
