"""One iteration of a run: roll out, grade, score, train, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tropd.checkpoints.checkpoint import writing
from tropd.data.graders import grade
from tropd.distributed.ranks import Ranks
from tropd.errors import EngineError, TeacherError, TrainingDiverged
from tropd.monitoring.alarms import Alarm, Alarms
from tropd.monitoring.probes import Sums, probe_batch
from tropd.monitoring.rollouts import write_rollouts
from tropd.monitoring.teachers import said_of
from tropd.objective.support import NOTHING
from tropd.objective.terms import Context
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch, make_tokens
from tropd.training.draw_probes import probes_of_student, probes_of_teacher
from tropd.training.kept_batch import save_batch
from tropd.training.micro_batch import Seen
from tropd.training.source import Source, add_staleness, own_prompts
from tropd.training.step import StepSums, recall_needed, score, train_step
from tropd.types import Author, Rollout, StepRecord, TeacherScores, TermStats, key_of


@contextmanager
def clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to a phase."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


def iterate(
    parts: Parts, source: Source, directory: Path, step: int, alarms: Alarms
) -> tuple[StepRecord, ScoredBatch, list[Alarm]]:
    """Everything that happens at a step until the student is another, and what was seen."""
    run = parts.run
    seconds: dict[str, float] = {"rollout": 0.0, "score": 0.0, "train": 0.0, "sync": 0.0, "record": 0.0}
    progress = step / run.steps
    context = Context(progress=progress, world=parts.world)
    with clock(seconds, "rollout"), _writing(parts):
        written = source.take(step)
        source.begin(step + 1)
    with clock(seconds, "sync"):
        parts.engine.rest()
    with clock(seconds, "rollout"):
        rollouts = _graded(parts, written.rollouts)
    with clock(seconds, "score"):
        batch = _scored(parts, directory, step, rollouts, context, written.scores)
        drawn = probes_of_student(parts, batch.rollouts) | probes_of_teacher(parts, batch)
    watched = _Watched(parts, batch)
    with clock(seconds, "train"):
        sums = _train(parts, directory, step, batch, context, watched)
    with clock(seconds, "record"), writing(directory):
        write_rollouts(
            directory / "rollouts",
            step,
            batch.rollouts,
            decode=lambda ids: str(parts.tokenizer.decode(list(ids))),
            every=run.rollout.save_every,
            world=parts.world,
            **watched.evidence(batch),
        )
    record = _record(parts, step, progress, sums, watched.probes(parts.world) | drawn, batch, seconds)
    raised = alarms.check(
        record.probes,
        step=step,
        vocab_size=parts.vocab_size,
        loss=record.loss,
        gradient_norm=record.gradient_norm,
        max_new_tokens=run.rollout.max_new_tokens,
    )
    texts = tuple(f"{a.name}: {a.message}" for a in raised)
    return dataclasses.replace(record, alarms=texts), batch, raised


def hand_over(parts: Parts, source: Source, record: StepRecord) -> tuple[StepRecord, EngineError | None]:
    """Give the weights that were trained to whoever writes; the record with the time that it took, and what went wrong
    in the engine."""
    seconds, failure = dict(record.seconds), None
    with clock(seconds, "rollout"):
        source.wait()
    with clock(seconds, "sync"):
        parts.learner.sync()
        try:
            parts.engine.sync(record.step + 1)
        except EngineError as error:
            failure = error
    return dataclasses.replace(record, seconds=seconds), failure


def _train(
    parts: Parts, directory: Path, step: int, batch: ScoredBatch, context: Context, watched: _Watched
) -> StepSums:
    run, world = parts.run, parts.world
    who = [world.rank] if world.rank else []
    torch.manual_seed(key_of(run.seed, "train", step, *who))  # dropout, wherever the model has some
    try:
        sums = train_step(
            batch,
            run.method.objective,
            parts.learner,
            context,
            tokens_per_micro_batch=run.tokens_per_micro_batch,
            num_updates=run.optimizer.num_updates,
            watch=watched,
            teacher=parts.teacher,
            places=[
                p * run.rollout.num_rollouts + i for p in own_prompts(parts) for i in range(run.rollout.num_rollouts)
            ],
        )
    except TrainingDiverged as error:
        raise TrainingDiverged(_keep(parts, directory, step, batch, error)) from error
    return _over_ranks(sums, world)


def _over_ranks(sums: StepSums, world: Ranks) -> StepSums:
    """Losses and terms of all ranks; norms and rates are the same on each."""
    if world.size == 1:
        return sums
    whole = StepSums(gradient_norms=sums.gradient_norms, learning_rate=sums.learning_rate)
    for loss, terms in world.gather_json([sums.loss, {n: dataclasses.asdict(t) for n, t in sums.terms.items()}]):
        whole.add(loss, {name: TermStats(**values) for name, values in terms.items()}, 1.0)
    return whole


def _scored(
    parts: Parts,
    directory: Path,
    step: int,
    rollouts: list[Rollout],
    context: Context,
    scores: list[TeacherScores] | None,
) -> ScoredBatch:
    run, learner = parts.run, parts.learner
    objective = run.method.objective
    recall = recall_needed(objective, run.optimizer.num_updates)
    try:
        how: dict[str, Any] = {"seed": run.seed, "recall": recall, "context": context, "scores": scores}
        return score(rollouts, objective, parts.teacher, learner, **how)
    except (TeacherError, TrainingDiverged) as error:  # kept without what could not be had
        tokens = make_tokens(rollouts, run.seed, learner.device, learner.vocab_size)
        batch = ScoredBatch(rollouts=tuple(rollouts), tokens=tokens)
        raise type(error)(_keep(parts, directory, step, batch, error)) from error


def _keep(parts: Parts, directory: Path, step: int, batch: ScoredBatch, error: Exception) -> str:
    directory = parts.world.own_folder(directory)
    kept = save_batch(directory, step, batch)
    return (
        f"step {step}: {error} The batch is in {kept}: look at it with `tropd inspect {directory} --step {step}`. "
        "The last checkpoint is untouched."
    )


class _Watched:
    """What is seen while training: probes, and what is kept of each token."""

    def __init__(self, parts: Parts, batch: ScoredBatch) -> None:
        self.sampling, self.sums = parts.run.sampling, Sums.nothing()
        top_NK = batch.tokens.peek("teacher_topk_logprobs_NK")
        self.sampled = top_NK is not None and bool((top_NK[:, :1] <= NOTHING).any())
        self.by_teacher = {name: Sums.nothing() for name in parts.run.teachers}
        """Where there are several."""
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.student: dict[str, Tensor] = {}

    def __call__(self, seen: Seen) -> None:
        at_teacher = seen.view.peek("topk_logprobs_NK")
        how: dict[str, Any] = {"sampled": self.sampled, "sampling": self.sampling}
        self.sums += probe_batch(seen.tokens, seen.part.rollouts, topk_logprobs_NK=at_teacher, **how)
        for name in self.by_teacher:
            rows_N = _rows_for(name, seen)
            rollouts = [rollout for rollout in seen.part.rollouts if rollout.prompt.teacher == name]
            at_own = None if at_teacher is None else at_teacher[rows_N]
            self.by_teacher[name] += probe_batch(seen.tokens.rows(rows_N), rollouts, topk_logprobs_NK=at_own, **how)
        for term, by_rollout in seen.weights().items():
            self.weights.setdefault(term, {}).update(by_rollout)
        self.student.update(seen.student_logprobs())

    def probes(self, world: Ranks) -> dict[str, float]:
        """Of all ranks."""
        found = self.sums.gather(world).result()
        for name, sums in self.by_teacher.items():
            found |= said_of(name, sums.gather(world).result())
        return found

    def evidence(self, batch: ScoredBatch) -> dict[str, Any]:
        """What is known of each token of the batch, as `write_rollouts` takes it."""
        tokens = batch.tokens
        student_N = torch.cat([self.student[r.id] for r in batch.rollouts])
        sampled_N = tokens.peek("student_logprobs_N")
        if sampled_N is not None:  # rows that no term could weigh were not in the gradient pass
            own_N = student_N.isnan() & (tokens.authors_N == Author.STUDENT)
            student_N = torch.where(own_N, sampled_N.to(student_N), student_N)
        return {
            "student_logprobs_N": student_N,
            "weights": {term: torch.cat([by[r.id] for r in batch.rollouts]) for term, by in self.weights.items()},
            **{
                name: tokens.peek(name)
                for name in ("teacher_logprobs_N", "teacher_topk_ids_NK", "teacher_topk_logprobs_NK")
            },
        }


def _rows_for(teacher: str, seen: Seen) -> Tensor:
    """The live rows of what one of several teachers scored."""
    rollouts = seen.part.rollouts
    own_S = torch.tensor([rollout.prompt.teacher == teacher for rollout in rollouts])
    own_N = own_S.repeat_interleave(torch.tensor([len(rollout.response_ids) for rollout in rollouts]))
    own_N = own_N.to(seen.tokens.token_ids_N.device)
    return own_N if seen.live is None else own_N[seen.live]


def _writing(parts: Parts) -> AbstractContextManager[Any]:
    """A sharded teacher that writes is whole for a while: ranks ask it different numbers of times."""
    return nullcontext() if parts.writer is None else parts.teacher.whole()


def _graded(parts: Parts, rollouts: list[Rollout]) -> list[Rollout]:
    if parts.grader is None:
        return rollouts
    rewards = grade(parts.grader, rollouts, parts.tokenizer)
    return [dataclasses.replace(r, reward=reward) for r, reward in zip(rollouts, rewards, strict=True)]


def _record(
    parts: Parts,
    step: int,
    progress: float,
    sums: StepSums,
    probes: dict[str, float],
    batch: ScoredBatch,
    seconds: dict[str, float],
) -> StepRecord:
    world, authors_N = parts.world, batch.tokens.authors_N
    limit = parts.run.optimizer.max_gradient_norm
    probes["gradient/clipped"] = sum(n > limit for n in sums.gradient_norms) / len(sums.gradient_norms)
    if parts.run.rollout.staleness:
        add_staleness(probes, step, batch.rollouts)
    if parts.grader is not None:
        rewards = [reward for part in world.gather_json([r.reward or 0.0 for r in batch.rollouts]) for reward in part]
        probes["reward/mean"] = sum(rewards) / len(rewards)
    tokens = {
        "prompt": sum(len(r.prompt.token_ids) for r in batch.rollouts),
        "student": int((authors_N == Author.STUDENT).sum()),
        "teacher": int((authors_N == Author.TEACHER).sum()),
    }
    told = world.gather_json(tokens)
    return StepRecord(
        step=step,
        progress=progress,
        policy_version=step,
        loss=sums.loss,
        terms=sums.terms,
        probes=probes,
        gradient_norm=max(sums.gradient_norms),
        learning_rate=sums.learning_rate,
        tokens={name: sum(part[name] for part in told) for name in tokens},
        seconds=seconds,
    )
