"""Whether the first tokens of the responses pull the student where all of them do: the cosine of two gradients.

tokens before a position --> gradient --> a copy of it
the tokens after it      --> added: the gradient of the step, as always --> cosine --> optimiser
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from tropd.distributed.ranks import Ranks
from tropd.model.optimizer import Optimizer, local

Watch = Callable[[dict[str, Tensor]], AbstractContextManager[None]]


class Alignment:
    """Of one update, over all trained tensors and ranks, in float32."""

    def __init__(self, position: int, optimizer: Optimizer, world: Ranks) -> None:
        self.position, self.optimizer, self.world = position, optimizer, world
        self.first: dict[str, Tensor] = {}
        """The gradient of the tokens before the position; this process's part of it."""
        self.cosine = math.nan

    def between(self) -> None:
        """Between the two parts: keep the gradient so far."""
        for name, parameter in self.optimizer.parameters.items():
            given = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            self.first[name] = local(given).detach().float().clone()

    def beside(self, watch: Watch) -> Watch:
        """For `Optimizer.watch`: what it does, after the cosine is measured."""

        @contextmanager
        def measured(masters: dict[str, Tensor]) -> Iterator[None]:
            if self.first:
                self.cosine = self._cosine(masters)
                self.first = {}
            with watch(masters):
                yield

        return measured

    def probes(self) -> dict[str, float]:
        return {"gradient/cosine": self.cosine} if math.isfinite(self.cosine) else {}

    @torch.no_grad()
    def _cosine(self, masters: dict[str, Tensor]) -> float:
        """NaN where one of them is zero or not finite."""
        if self.optimizer.add_over_ranks is not None:  # the masters' gradients are summed already
            self.optimizer.add_over_ranks(list(self.first.values()))
        sums = torch.zeros(3, dtype=torch.float64)
        for name, first in self.first.items():
            grad = masters[name].grad
            assert grad is not None
            a, b = first.flatten(), local(grad).float().flatten()
            sums += torch.stack([a.dot(b), a.dot(a), b.dot(b)]).cpu()
        if any(local(x) is not x for x in masters.values()):  # each rank has a part of every tensor
            sums = self.world.gather(sums[None]).sum(0)
        both, one, other = sums.tolist()
        return both / math.sqrt(one * other) if one > 0 and other > 0 else math.nan
