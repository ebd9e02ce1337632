"""For whom and when a batch is planned: the ranks, the progress, what is remembered; and how far a piece looks."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Protocol

from torch import Tensor

from tropd.objective.memory import Memory


class Reach(IntEnum):
    """How far a piece looks beyond the token itself.  Anything above TOKEN must be planned on the whole batch."""

    TOKEN = 0
    SEQUENCE = 1
    GROUP = 2
    BATCH = 3


class World(Protocol):
    """The ranks, as a plan sees them: the number of this one, how many there are, and a way to gather tensors."""

    rank: int
    size: int

    def gather(self, x: Tensor) -> Tensor:
        """The tensors of all ranks, concatenated along the first axis in rank order; lengths may differ."""
        ...


class Alone:
    """One process."""

    rank, size = 0, 1

    def gather(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """The training progress and the ranks for which a batch is planned, and what the run remembers."""

    progress: float = 0.0
    world: World = Alone()
    memory: Memory = field(default_factory=Memory, compare=False)
