"""A teacher that follows the student: the weights with which it reads, and their moves.

    score step t  -->  update the student  -->  move the teacher  -->  score step t + 1

Between two moves nothing changes the teacher.  After a copy it is the student that writes the next step's rollouts: a
copy after every step is the live student.  A move reads the optimiser's own parameters, which are float32 where the
model is in half precision.  An average is kept in float32 too: bfloat16 has 8 bits, so a thousandth of the way to the
student would be rounded away, and the teacher would never move.

With an adapter, only the adapter is held a second time, and takes the student's place while the teacher reads or
writes.  Without one, the teacher is a model of its own, sharded or whole, whatever the student is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tropd.briefings.follow import Answers, Follow
from tropd.errors import CheckpointError, ConfigError
from tropd.objective.memory import Memory
from tropd.teachers.local import LocalTeacher

_HALF = (torch.bfloat16, torch.float16)


class Swapped:
    """A second set of the student's trained tensors, an adapter, at first as they are now."""

    def __init__(self, student: nn.Module) -> None:
        self.student = {name: p for name, p in student.named_parameters() if p.requires_grad}
        self.tensors = {name: p.detach().clone() for name, p in self.student.items()}

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside the block the student has these tensors in the place of its own; nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.student.items():
            parameter.data, self.tensors[name] = self.tensors[name], parameter.data


class Follower:
    """The weights of a teacher that follows the student, with its rule."""

    def __init__(self, name: str, rule: Follow, teacher: LocalTeacher, swapped: Swapped | None = None) -> None:
        """`name` is that of its section.  `swapped`: it is the student with these tensors in place of its own."""
        self.name, self.rule, self.teacher, self.swapped = name, rule, teacher, swapped
        self.averages: dict[str, Tensor] = {}
        """In float32, of tensors that the teacher reads in half precision; empty before the first move."""
        self.moves = 0
        """How often its weights have changed in this process."""

    def reading(self) -> AbstractContextManager[None]:
        """Inside the block the model has the teacher's weights."""
        return nullcontext() if self.swapped is None else self.swapped()

    def check(self, trained: Mapping[str, Tensor]) -> None:
        """Refuse a student whose trained weights are not those of the teacher."""
        weights = self._weights()
        if not trained:
            raise ConfigError(
                f"{self.name} follows the student, but the student trains no weights. Leave {self.name}.follow out."
            )
        if odd := sorted(weights.keys() ^ trained.keys()):
            raise ConfigError(
                f"{self.name} follows the student, which trains {len(trained)} tensors where the teacher has "
                f"{len(weights)}; they differ in {odd[0]!r}. Set {self.name}.path to a model, and leave its follow out."
            )

    def after(self, step: int, trained: Mapping[str, Tensor], answers: Answers | None, memory: Memory) -> None:
        """What this step does to the teacher.  `trained` are the optimiser's parameters; all ranks call together."""
        if self.rule.moves(step, answers, memory, self.key):
            self._move(trained)

    def age(self, step: int, memory: Memory) -> int:
        """For how many steps the teacher that reads this step has stood still."""
        return self.rule.age(step, memory, self.key)

    @property
    def key(self) -> str:
        """Of its tensors in memory."""
        return f"follow.{self.name}"

    def held(self) -> dict[str, Tensor]:
        """What moves, and what a checkpoint holds: the weights, or their averages."""
        weights = self._weights()
        if not self.rule.averages:
            return weights
        if not self.averages:
            self.averages = {name: x.float() for name, x in weights.items() if x.dtype in _HALF}
        return weights | self.averages

    def state_tensors(self) -> dict[str, Tensor]:
        """`held` by names that are no other tensor's in a checkpoint."""
        return {f"{self.name}.{name}": x for name, x in self.held().items()}

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for name, x in self.state_tensors().items():
            if name not in tensors or tensors[name].shape != x.shape:
                there = f"shape {tuple(tensors[name].shape)}" if name in tensors else "no place"
                raise CheckpointError(
                    f"{name!r} has {there} in the checkpoint, the teacher that follows the student has shape "
                    f"{tuple(x.shape)}. The checkpoint belongs to another model."
                )
            _local(x).copy_(_local(_laid_out(tensors[name].to(x.device), x)))
        self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Read with the averages as they are now."""
        self.moves += 1
        weights = self._weights()
        for name, average in self.averages.items():
            _local(weights[name]).copy_(_local(average))

    @torch.no_grad()
    def _move(self, trained: Mapping[str, Tensor]) -> None:
        for name, x in self.held().items():
            student = _local(_laid_out(trained[name].detach(), x))
            # As a difference: a share of 0 changes no bit, and a share of 1 leaves none.
            _local(x).copy_(student) if self.rule.share == 1 else _local(x).lerp_(student.to(x.dtype), self.rule.share)
        self.settle()

    def _weights(self) -> dict[str, Tensor]:
        if self.swapped is not None:
            return self.swapped.tensors
        if self.teacher.shards is not None:
            self.teacher.shards.put_away()
        return {name: p.detach() for name, p in self.teacher.forward.model.named_parameters()}


def follow(
    followers: Sequence[Follower],
    step: int,
    trained: Mapping[str, Tensor],
    answers: Answers | None,
    probes: Mapping[str, float],
    memory: Memory,
) -> dict[str, float]:
    """Move what moves after this step, whose other probes are given; returns probes:

    age    steps that the teacher has stood still when it reads this step
    kl     KL(student || teacher) on the student's tokens, estimated by the mean of log pi_S - log pi_T
    shock  by how much that has changed since the step before, where the teacher was copied in between
    """
    found: dict[str, float] = {}
    for follower in followers:
        name = "follow" if follower.name == "teacher" else f"follow/{follower.name}"
        age, prefix = follower.age(step, memory), f"{follower.key}/"
        found[f"{name}/age"] = float(age)
        if (ratio := probes.get(f"{follower.name.replace('.', '/')}/ratio/mean".removeprefix("teacher/"))) is not None:
            if age == 0 and follower.rule.share == 1 and f"{prefix}kl" in memory:
                found[f"{name}/shock"] = -ratio - float(memory[f"{prefix}kl"])
            memory[f"{prefix}kl"] = torch.tensor(-ratio, dtype=torch.float64)
        follower.after(step, trained, answers, memory)
        found |= {f"{name}/{n.removeprefix(prefix)}": float(x) for n, x in memory.items() if n.startswith(prefix)}
    return found


def _laid_out(source: Tensor, like: Tensor) -> Tensor:
    """The source as `like` lies over the ranks: whole, or in parts."""
    if not hasattr(source, "to_local") and not hasattr(like, "to_local"):
        return source
    from tropd.distributed.sharding import laid_out

    return laid_out(source, like)


def whole(x: Any) -> Tensor:
    """A tensor of all ranks, which call together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _local(x: Any) -> Tensor:
    return x.to_local() if hasattr(x, "to_local") else x
