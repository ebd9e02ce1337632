"""The student as the training step uses it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tropd.objective.context import World
from tropd.objective.evidence import Needs
from tropd.teachers.teacher import Teacher
from tropd.training.micro_batch import MicroBatch, Seen
from tropd.types import Rollout


class Learner(Protocol):
    """Implemented by `tropd.training.learner.ModelLearner` and `tropd.laboratory.tabular.TabularLM`."""

    device: torch.device
    vocab_size: int | None

    @property
    def expands(self) -> Container[str]:
        """The readers whose whole distributions it makes from their hidden states."""
        ...

    margin: float | None
    """The log-odds of a written token seldom differ by more than this from those in its rollout; None if a micro-batch
    cannot be scored again when they do."""

    def learn(self, batch: MicroBatch) -> Seen:
        """Add the gradient of the micro-batch's loss, taken in as many pieces as the learner likes."""
        ...

    def measure(
        self, rollouts: Sequence[Rollout], needs: Needs, top_k: int = 0, at_ids_NM: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Its log-probabilities and the like, without gradient, as fields of Tokens for the plan; as "at_NM" those at
        the given ids."""
        ...

    def reverse_kl(self, rollouts: Sequence[Rollout], teacher: Teacher, as_read: Sequence[Rollout]) -> Tensor:
        """KL(student || teacher) at every response token; `as_read` are the rollouts as the teacher reads them."""
        ...

    def spare_passes(self, num_passes: int, world: World) -> int:
        """How many more passes the busiest rank has.  Every rank calls this before its first pass: ranks run them
        together."""
        ...

    def idle(self, num_passes: int) -> None:
        """Take part in the remaining passes of other ranks; every rank calls this after its last pass."""
        ...

    def update(self) -> tuple[float, float]:
        """One optimiser step with the current gradients: (gradient norm before clipping, learning rate)."""
        ...
