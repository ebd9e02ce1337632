"""A run's state besides its weights, and how everything is saved and restored."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch import Tensor

from tropd.checkpoints import checkpoint as checkpoints
from tropd.model.origins import check_same
from tropd.monitoring.alarms import Alarms
from tropd.monitoring.probe import PROBE
from tropd.run.environment import changes, environment_of
from tropd.teachers.following import whole
from tropd.training.assembly import Parts
from tropd.training.source import Source
from tropd.types import StepRecord


@dataclass
class State:
    """What changes during a run besides the weights."""

    source: Source
    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    """The best evaluated step and its score."""
    before: dict[str, float] = field(default_factory=dict)
    """Evaluation of the student before training."""
    latest: dict[str, float] = field(default_factory=dict)
    owed: StepRecord | None = None
    """The record of the last step, if its evaluation failed."""
    signal: int = 0
    """The signal that reached this process or another process of the run."""
    asked: bool = False
    """Whether a signal or a callback has asked to stop after the step."""
    notes: list[str] = field(default_factory=list)
    """Notes for the next record, from when the run was resumed."""
    stop: bool = False
    """The processes have agreed to stop."""

    @property
    def num_recorded(self) -> int:
        """How many steps have their record written."""
        return self.step if self.owed is None else self.step - 1


def save(parts: Parts, directory: Path, state: State, alarms: Alarms, *, undone: bool = False) -> None:
    """Write a checkpoint; of a sharded student each rank writes its part, else rank 0 writes everything.  `undone`: the
    last step failed before any weight changed, and will be repeated."""
    optimizer, shards, world = parts.learner.optimizer, parts.learner.shards, parts.world
    contents: dict[str, Any] = {"run": parts.run.dump(), "state": _facts(parts, state, alarms, undone)}
    contents["teachers"] = _held(parts) if shards is not None else {k: whole(x) for k, x in _held(parts).items()}
    if shards is not None:
        from tropd.checkpoints import sharded_checkpoint

        sharded_checkpoint.save(directory, state.step, shards=shards, optimizer=optimizer, world=world, **contents)
    elif world.leads:
        weights = checkpoints.trained_tensors(parts.model)
        checkpoints.save(directory, state.step, weights=weights, optimizer=optimizer.state_tensors(), **contents)
    if world.leads:
        best = state.best.get("step")
        checkpoints.prune(directory, parts.run.checkpoint.keep, int(best) if best is not None else None)


def _facts(parts: Parts, state: State, alarms: Alarms, undone: bool) -> dict[str, Any]:
    return {
        "fingerprint": parts.run.fingerprint(),
        "steps": parts.run.steps,
        "optimizer_steps": parts.learner.optimizer.num_steps,
        "stream": state.source.state_before() if undone else state.source.state_dict(),
        "alarms": alarms.state_dict(),
        "memory": parts.memory.state_dict(),
        "origins": parts.origins,
        "best": state.best,
        "before": state.before,
        "latest": state.latest,
        "owed": None if state.owed is None else asdict(state.owed),
        "environment": environment_of(parts),
    }


def _held(parts: Parts) -> dict[str, Tensor]:
    """The weights of the teachers that follow the student."""
    return {name: x for follower in parts.followers for name, x in follower.state_tensors().items()}


def restore(parts: Parts, state: State, alarms: Alarms, saved: checkpoints.Checkpoint) -> None:
    held = saved.state
    check_same(held["origins"], parts.origins, saved.path)
    state.notes = changes(held.get("environment", {}), environment_of(parts))
    optimizer, shards = parts.learner.optimizer, parts.learner.shards
    if shards is not None:
        from tropd.checkpoints import sharded_checkpoint

        sharded_checkpoint.restore(saved.path, shards, optimizer, held["optimizer_steps"], _held(parts))
        for follower in parts.followers:
            follower.settle()
    else:
        checkpoints.load_trained(parts.model, saved.weights, saved.path)
        optimizer.load_state_tensors(saved.optimizer, held["optimizer_steps"])
        for follower in parts.followers:
            follower.load_state_tensors(saved.teachers)
    state.source.load_state_dict(held["stream"])
    alarms.load_state_dict(held["alarms"])
    parts.memory.load_state_dict(held.get("memory", {}))
    pieces = [piece.memory for piece in parts.run.method.objective.memories]
    others = [follower.key for follower in parts.followers]
    others += [name.rpartition("/")[0] for name in parts.memory if name.startswith(PROBE)]  # or left out since
    parts.memory.check_owners({*pieces, *parts.run.policy.memories, *others})
    for probe in parts.probes:
        probe.go_on()
    parts.engine.sync(saved.step)
    state.step, state.best = saved.step, held["best"]
    state.before, state.latest = held["before"], held["latest"]
    state.owed = None if (owed := held.get("owed")) is None else TypeAdapter(StepRecord).validate_python(owed)
