"""The work of each phase of a step, for the devices that carry it out.

A phase takes the longer of its arithmetic and its traffic (the roofline of Williams et al. 2009) over the share of the
peak that real kernels reach,

    score, measure   2 P tokens                                       the teacher; the student before it is trained
    readers          2 P tokens                                       each other model that reads; the teacher's own
                                                                      model reads for each reader that has it
    train            4 P tokens, 2 more for what is trained, 2 more if gradient checkpointing repeats the forward
    write, prefix    2 P tokens, or P bytes and the cache read once per token of an answer and batch of answers

and never less than its floor: the time of this process for each token and for starting each operation.  A tiny model's
step consists of little else.

P are the parameters that a token uses: always those of the layers, the head's if a token is written, and never those of
the input embedding, which is only looked up; those of both models where they write together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from statistics import fmean
from types import MappingProxyType
from typing import Any

import torch

from tropd.config.models import ServerConfig
from tropd.config.run import Run
from tropd.doctor.cost import Need, cached
from tropd.doctor.readers import asked_of, has_teachers_model
from tropd.doctor.subject import Subject
from tropd.methods.horizon import horizons
from tropd.model.loading import choose_dtype
from tropd.objective.memory import Memory
from tropd.planning.devices import Device
from tropd.training.assembly import shards_student
from tropd.training.scoring import PASS_NEEDS
from tropd.training.step import recall_needed
from tropd.types import READER

OPERATIONS = {"started": 50, "replayed": 5}
"""Operations of a layer in one pass: started one by one by Python (measured with tiny models on a CPU), or replayed by
a server as a CUDA graph of fused kernels, in units of one start (assumed)."""
AROUND = 2
"""Embedding, head and sampling start as many operations as this many layers."""
TRAINING = 5
"""Forward, backward and optimiser start this many times the operations of a forward pass (measured on a CPU)."""


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The texts of a step, on average over the run.  Every answer is assumed to have the greatest length."""

    rollouts: int
    prompt: float
    """Tokens of a prompt."""
    told: float
    """Tokens of what the teacher reads instead, as far as that is known before the run."""
    new: float
    """Tokens of an answer, up to the horizon."""
    prefix: float
    """Tokens of an answer before the student begins, in rollouts that the student continues."""
    by_student: float
    """Rollouts in which the student writes."""
    jointly: float = 0.0
    """The share of them that it writes with the teacher."""
    by_teacher: float
    """Texts that the teacher has to write, because they are not cached yet."""
    told_to: Mapping[str, float] = field(default_factory=dict)
    """The same as `told`, of other readers."""

    @property
    def read(self) -> float:
        """Tokens that are scored and trained on, or their context."""
        return (self.prompt + self.new) * self.rollouts

    def read_by(self, reader: str) -> float:
        """Tokens that a reader scores, or their context."""
        return (self.told_to.get(reader, self.told) + self.new) * self.rollouts

    @property
    def answered(self) -> float:
        return float(self.new * self.rollouts)

    @property
    def written(self) -> float:
        """Tokens by the student."""
        return self.by_student * (self.new - self.prefix)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The size of a model, per token."""

    layers: float
    """Parameters."""
    head: float
    width: int
    num_layers: int
    cached: int
    """Bytes of keys and values per token."""

    @property
    def bytes(self) -> float:
        return (self.layers + self.head) * self.width

    def starts(self, how: str = "started") -> int:
        """Operations of one pass."""
        return OPERATIONS[how] * (self.num_layers + AROUND)


@dataclass(frozen=True, kw_only=True)
class Phase:
    kind: str
    """The kind of work: score, train or write."""
    operations: float = 0.0
    traffic: Callable[[int], float] = lambda number: 0.0
    """Bytes that each device reads and writes, by the number of devices."""
    received: float = 0.0
    """Bytes that each device gets from the others."""
    starts: Callable[[int], float] = lambda number: 0.0
    """Operations that each device starts, one after another, by the number of devices."""
    tokens: float = 0.0

    def seconds(self, device: Device, number: int) -> float:
        busy = max(self.operations / device.operations / number, self.traffic(number) / device.bandwidth)
        floor = self.starts(number) * device.launch + self.tokens / number * device.token
        return max(busy / device.reached[self.kind], self.received / device.link, floor)


def texts_of(run: Run, subject: Subject) -> Texts:
    policy, wanted, prompts = run.policy, run.rollout, subject.prompts
    rollouts = wanted.num_prompts * wanted.num_rollouts
    lengths = horizons(policy, wanted.max_new_tokens, run.steps)
    prompt = fmean(len(p.token_ids) for p in prompts)
    visits = wanted.num_prompts * run.steps
    kept = run.teacher.text_cache and not run.teacher.moves and not run.data.streaming
    fresh = sum(not p.response_ids for p in prompts) / len(prompts)
    fresh *= min(1.0, len(prompts) / visits) if kept else 1.0
    each = [policy.shares(step / run.steps, wanted.num_rollouts, new) for step, new in enumerate(lengths)]
    by_student = fmean(share.by_student for share in each)
    given = fmean(share.by_student * share.prefix for share in each)
    texts = wanted.num_prompts * fmean(share.texts for share in each)
    return Texts(
        rollouts=rollouts,
        prompt=prompt,
        told=fmean(len(p.told.get(READER) or p.token_ids) for p in prompts),
        new=fmean(lengths),
        prefix=given / by_student if by_student else 0.0,
        by_student=rollouts * by_student,
        jointly=fmean(policy.decoding(step / run.steps, Memory()) is not None for step in range(run.steps)),
        by_teacher=texts * fresh,
        told_to={name: fmean(len(p.told.get(name) or p.token_ids) for p in prompts) for name in run.all_readers},
    )


def size_of(config: Any, parameters: float, width: int) -> Size:
    config = config.get_text_config()
    head = float(config.vocab_size * config.hidden_size)
    layers = parameters - head * (1 if config.tie_word_embeddings else 2)
    num_layers = int(config.num_hidden_layers)
    return Size(layers=layers, head=head, width=width, num_layers=num_layers, cached=cached(config, width))


def sizes_of(subject: Subject, need: Need, teacher: float, device: torch.device) -> tuple[Size, Size]:
    """The sizes of student and teacher; `teacher` is the number of its parameters."""
    run = subject.run
    width = choose_dtype(run.student.dtype, device).itemsize
    student = size_of(subject.student.config, need.student / width, width)
    if subject.teacher is None:  # the student without its adapter
        return student, replace(student, layers=student.layers - need.gradients / width)
    return student, size_of(subject.teacher.config, teacher, choose_dtype(run.teacher.dtype, device).itemsize)


def at_once(run: Run, texts: Texts, server: ServerConfig | None) -> int:
    """Answers that are written at the same time on one device."""
    if server is None:
        return run.rollout.max_batch
    return max(1, min(server.max_requests, server.max_tokens_in_flight // ceil(texts.prompt + texts.new)))


def phases_of(
    run: Run,
    texts: Texts,
    student: Size,
    teacher: Size,
    need: Need,
    trainers: int,
    readers: Mapping[str, Size] = MappingProxyType({}),
) -> dict[str, Phase]:
    """The phases of a step in order; empty phases are left out."""
    new = texts.new - texts.prefix
    own = at_once(run, texts, run.rollout.server if run.rollout.servers else None)
    theirs = at_once(run, texts, run.teacher.server if run.teacher.servers else None)
    objective = run.method.objective
    theirs_too = [name for name in asked_of(run) if has_teachers_model(run, name) and not run.teacher.only_writes]
    writing = [
        _writing(student, texts.by_student, texts.prompt + texts.prefix, new, own, run.rollout.servers),
        _writing(teacher, texts.by_student * texts.jointly, texts.told + texts.prefix, new, own),
    ]
    phases = {
        "prefix": _writing(teacher, texts.by_teacher, texts.told, texts.new, theirs, run.teacher.servers),
        "write": _together(writing),
        "score": _together([_scoring(run, teacher, texts, texts.read_by(name)) for name in theirs_too]),
        "readers": _together([_scoring(run, size, texts, texts.read_by(name)) for name, size in readers.items()]),
        "measure": _scoring(run, student, texts, texts.read),
        "train": _training(run, texts, student, need, trainers),
    }
    if run.parallel.teacher == "sharded" and trainers > 1:
        passes = sum(ceil(texts.read_by(name) / trainers / run.tokens_per_micro_batch) for name in theirs_too)
        received = need.teacher * (1 - 1 / trainers) * passes
        phases["score"] = replace(phases["score"], received=received)
    asked = {
        "prefix": texts.by_teacher > 0,
        "write": texts.by_student > 0,
        "score": bool(theirs_too),
        "readers": bool(readers),
        "measure": bool(objective.needs & PASS_NEEDS) or recall_needed(objective, run.optimizer.num_updates),
    }
    return {name: phase for name, phase in phases.items() if asked.get(name, True)}


def _scoring(run: Run, model: Size, texts: Texts, read: float) -> Phase:
    operations = 2 * (model.layers * read + model.head * texts.answered)

    def passes(number: int) -> float:
        """Micro-batches on each device."""
        return float(ceil(read / number / run.tokens_per_micro_batch))

    return Phase(
        kind="score",
        operations=operations,
        traffic=lambda number: model.bytes,
        starts=lambda number: passes(number) * model.starts(),
        tokens=read,
    )


def _together(parts: Sequence[Phase]) -> Phase:
    """One after another."""
    return Phase(
        kind=parts[0].kind if parts else "score",
        operations=sum(part.operations for part in parts),
        traffic=lambda number: sum(part.traffic(number) for part in parts),
        starts=lambda number: sum(part.starts(number) for part in parts),
        tokens=sum(part.tokens for part in parts),
    )


def _writing(
    model: Size, number_of_texts: float, given: float, new: float, batch: int, servers: tuple[str, ...] = ()
) -> Phase:
    """The work of writing answers of `new` tokens after `given` ones."""

    def batches(number: int) -> tuple[int, int]:
        """The number of batches on each device, and of answers in a batch."""
        each = ceil(number_of_texts / number)
        rows = min(batch, each)
        return ceil(each / max(rows, 1)), rows

    def traffic(number: int) -> float:
        times, rows = batches(number)
        return times * new * (model.bytes + rows * (given + new / 2) * model.cached)

    operations = 2 * number_of_texts * (model.layers * (given + new) + model.head * new)
    return Phase(
        kind="write",
        operations=operations,
        traffic=traffic,
        starts=lambda number: batches(number)[0] * new * model.starts("replayed" if servers else "started"),
        tokens=number_of_texts * new,
    )


def _training(run: Run, texts: Texts, model: Size, need: Need, trainers: int) -> Phase:
    trained = need.moments / 8
    layers, head = (trained, 0.0) if run.student.lora else (model.layers, model.head)
    again = 2 * model.layers if run.student.gradient_checkpointing else 0.0
    operations = (4 * model.layers + again + 2 * layers) * texts.read + (4 * model.head + 2 * head) * texts.answered
    updates = run.optimizer.num_updates
    passes = max(updates, ceil(texts.read / trainers / run.tokens_per_micro_batch))
    if shards_student(run, trainers):
        # Weights twice a pass, gradients in float32 once, and the whole once a step for the rollouts.
        received = (passes * (2 * need.student + 4 * trained) + need.student) * (1 - 1 / trainers)
    else:
        received = updates * 2 * 4 * trained * (1 - 1 / trainers)
    moments = 2 * need.moments * updates / (trainers if shards_student(run, trainers) else 1)
    traffic = passes * 3 * need.student + moments
    starts = passes * TRAINING * model.starts()
    return Phase(
        kind="train",
        operations=operations,
        traffic=lambda number: traffic,
        received=received,
        starts=lambda number: starts,
        tokens=2 * texts.read,  # forward and backward
    )
