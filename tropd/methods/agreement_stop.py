"""The online half of KAT: a text ends where student and teacher have agreed for too long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.methods.decoding import Decoding
from tropd.methods.joint import divergence
from tropd.methods.policies import Done, RolloutPolicy
from tropd.objective.memory import Memory
from tropd.objective.trap import Trap, lowest
from tropd.types import key_of


@dataclass(frozen=True, kw_only=True)
class AgreementStop(RolloutPolicy):
    """The student writes alone, with the teacher reading along: where KL(student || teacher), as a mean over the last
    tokens, stays below a quantile of what it was at its lowest in earlier responses, the response ends (KAT online).

    Responses that were cut count in the queue as well: without them only those that never came near the threshold would
    set the next one, and it would rise at every step.

    >>> AgreementStop().decoding(0.0, Memory())  # it only measures, until the queue has enough entries
    Watch(trap=Trap(window=64, streak=4, eta=0.3, exempt=128, capacity=4096, entries=512, steps=50), threshold=None)
    """

    trap: Trap = Trap()
    """When a response counts as lost in agreement (`tropd.objective.trap`)."""

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        queue_Q, steps = memory.get(f"{self.memory}/queue"), memory.number(f"{self.memory}/steps", 0)
        return Watch(trap=self.trap, threshold=self.trap.threshold(queue_Q, int(steps)))

    def remember(self, done: Done, memory: Memory) -> None:
        traces = {r.id: torch.tensor(r.trace, dtype=torch.float64) for r in done.rollouts if r.trace}
        means = {name: lowest(trace, self.trap.window) for name, trace in traces.items()}
        found = {key_of(0, name): float(mean) for name, mean in means.items() if mean is not None}
        keys = done.world.gather(torch.tensor(list(found), dtype=torch.int64))
        here = done.world.gather(torch.tensor(list(found.values()), dtype=torch.float64))
        memory[f"{self.memory}/queue"] = self.trap.pushed(memory.get(f"{self.memory}/queue"), keys, here)
        memory.put(f"{self.memory}/steps", int(memory.number(f"{self.memory}/steps", 0)) + 1)


@dataclass(frozen=True, kw_only=True)
class Watch(Decoding):
    """Measures KL(student || teacher) at each token, and ends a text below the threshold."""

    trap: Trap
    threshold: float | None

    def measure(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor | None:
        return divergence(student_BV, teacher_BV)

    def ends(self, trace: Sequence[float]) -> int | None:
        return None if self.threshold is None else self.trap.cut_now(trace, self.threshold)
