"""What a probe of your own inherits from: numbers of a step, which change nothing.

A number is a pair of sums, (total, weight), and its value is total / weight.  A process gets the rollouts of a step in
several parts, and several processes share them, so pairs are added up over all parts and processes before the
division.  A mean over tokens is (sum of the values, number of tokens).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.memory import Memory
from tropd.objective.plan import Plan
from tropd.types import Rollout

Numbers = Mapping[str, tuple[float, float]]
"""By name: a total and its weight.  A weight of 0 says nothing."""
PROBE = "probe."
"""What the names of probes in a run's memory begin with."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sight:
    """What a probe sees of some rollouts of a step, after their gradient.

    `tokens`, `view` and `plan` have a row for each response token that some term may weigh; `tokens.sequences_N` points
    into the rollouts of the whole step.
    """

    step: int
    rollouts: Sequence[Rollout]
    tokens: Tokens
    """What is known of each token: who wrote it, what the teacher says of it, ..."""
    view: StudentView
    """The student's log-probabilities in training."""
    plan: Plan
    """The weight and the reward of each token in each term."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Weight:
    """A trained tensor in the optimiser's precision; of a sharded student, this process's part of it."""

    value: Tensor
    gradient: Tensor | None
    """Of the whole batch, before it is clipped; `after_update` sees it clipped."""
    laid: Tensor
    """The tensor as it lies over the processes."""

    def whole(self) -> Tensor:
        """All parts of a sharded student's tensor.  Every process has to call it, in the same order."""
        full = getattr(self.laid, "full_tensor", None)
        return self.laid if full is None else full()


class Probe:
    """Override what you want to see.  Nothing that is seen may be changed.  What a probe says of a step depends on that
    step, on the student before training, and on what it keeps in `memory`, alone."""

    name: str = ""
    """Its numbers are recorded as NAME/NUMBER.  By default the name of the class in small letters."""
    needs: Needs = Needs.NOTHING
    """The evidence that it reads.  A run whose method does not read that too is refused: probes cost no evidence."""
    every: int = 1
    """It runs in steps 0, every, 2 * every, ...; a run file sets it."""

    step: int = 0
    """The step that it is asked about."""

    def begin(self, student: nn.Module, memory: Memory) -> None:
        """Called once, with the student before training, also where a run goes on.  `memory` is kept in checkpoints and
        is the same on all processes; a probe's names there are probe.NAME/ANY, NAME its own."""

    def go_on(self) -> None:
        """Called after `begin` where a run goes on, when the memory is that of the checkpoint."""

    def look(self, sight: Sight) -> Numbers:
        """Called for each part of a step's rollouts."""
        return {}

    def before_update(self, weights: Mapping[str, Weight]) -> Numbers:
        """Called before each update, with all trained tensors by name."""
        return {}

    def after_update(self, weights: Mapping[str, Weight]) -> Numbers:
        """Called after it, with the same tensors."""
        return {}
