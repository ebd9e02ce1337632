"""One step of a run: roll out, grade, score, train, record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from tropd.briefings.follow import Answers
from tropd.checkpoints.checkpoint import writing
from tropd.data.graders import graded
from tropd.distributed.ranks import Ranks
from tropd.errors import EngineError, TeacherError, TrainingDiverged
from tropd.methods.decoding import Decoding
from tropd.methods.policies import Done
from tropd.monitoring.alarms import Alarm, Alarms
from tropd.monitoring.rollouts import write_rollouts
from tropd.objective.context import Context
from tropd.teachers.combined import Combined
from tropd.teachers.following import follow
from tropd.training.alignment import Alignment
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch, make_tokens
from tropd.training.draw_probes import probes_of_student, probes_of_teacher
from tropd.training.kept_batch import save_batch
from tropd.training.scoring import asked_of, score
from tropd.training.source import Source, Written, lags, own_places
from tropd.training.step import StepSums, recall_needed, train_step
from tropd.training.watched import Watched
from tropd.types import Author, Finish, Rollout, Sampling, StepRecord, TermStats, key_of


@contextmanager
def clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the duration of the block to a phase."""
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start


@dataclass(frozen=True, kw_only=True, eq=False)
class Iteration:
    """The result of a step."""

    record: StepRecord
    batch: ScoredBatch
    alarms: list[Alarm]
    """The alarms that this step raised."""


def iterate(parts: Parts, source: Source, directory: Path, step: int, alarms: Alarms) -> Iteration:
    """One step, from the prompts to the updated student."""
    run, world, learner, objective = parts.run, parts.world, parts.learner, parts.objective
    seconds: dict[str, float] = dict.fromkeys(("rollout", "score", "train", "sync", "record"), 0.0)
    context = Context(progress=step / run.steps, world=world, memory=parts.memory)

    written = _write(parts, source, step, seconds)
    rollouts = written.rollouts
    with clock(seconds, "score"), _keeping(lambda: _unscored(parts, rollouts), parts, directory, step):
        split = _split(parts, step, written.horizon)
        recall = recall_needed(objective, run.optimizer.num_updates, split)
        batch = score(
            rollouts,
            objective,
            parts.readers,
            learner,
            seed=run.seed,
            recall=recall,
            context=context,
            scores=written.scores,
            as_read={name: parts.briefer.as_read(name, rollouts) for name in asked_of(objective, parts.readers)},
        )
    with clock(seconds, "score"):
        drawn = probes_of_student(parts, batch.rollouts) | probes_of_teacher(parts, batch)

    behind = _behind(parts, step, batch)
    sampling, stale = _sampling(parts, step), max(behind, default=0) > 0
    watched = Watched(batch, sampling, step=step, probes=parts.probes, teachers=tuple(run.teachers), stale=stale)
    learner.optimizer.watch = split.beside(watched.others.update) if split else watched.others.update
    with clock(seconds, "train"), _keeping(lambda: batch, parts, directory, step):
        torch.manual_seed(key_of(run.seed, "train", step, *([world.rank] if world.rank else [])))  # for dropout
        sums = train_step(
            batch,
            objective,
            learner,
            context,
            tokens_per_micro_batch=run.tokens_per_micro_batch,
            num_updates=run.optimizer.num_updates,
            watch=watched,
            teacher=parts.readers,
            split=split,
            places=own_places(parts),
        )
        sums = _over_ranks(sums, world)
        probes = watched.probes(world) | (split.probes() if split else {})
        masters, answers = learner.optimizer.masters, _answers(parts, batch)
        moved = follow(parts.followers, step, masters, answers, probes, parts.memory)
    with clock(seconds, "record"), writing(directory):
        write_rollouts(
            directory / "rollouts",
            step,
            batch.rollouts,
            decode=lambda ids: str(parts.tokenizer.decode(list(ids))),
            every=run.rollout.save_every,
            world=world,
            **watched.evidence(),
        )
    record = StepRecord(
        step=step,
        progress=context.progress,
        policy_version=step,
        loss=sums.loss,
        terms=sums.terms,
        probes={**probes, **drawn, **moved, **_probes_of_step(parts, sums, batch, behind, written.horizon)},
        gradient_norm=max(sums.gradient_norms),
        learning_rate=sums.learning_rate,
        tokens=_count_tokens(batch, world),
        seconds=seconds,
    )
    _remember(parts, batch, record, context)
    raised = alarms.check(
        record.probes,
        step=step,
        vocab_size=parts.vocab_size,
        loss=record.loss,
        gradient_norm=record.gradient_norm,
        max_new_tokens=run.rollout.max_new_tokens,
    )
    messages = tuple(f"{alarm.name}: {alarm.message}" for alarm in raised)
    return Iteration(record=dataclasses.replace(record, alarms=messages), batch=batch, alarms=raised)


def _split(parts: Parts, step: int, horizon: int) -> Alignment | None:
    """Where the policy asks for it, and responses may go on from there."""
    position = parts.run.policy.split(step, step / parts.run.steps, parts.memory)
    if position is None or position >= horizon:
        return None
    return Alignment(position, parts.learner.optimizer, parts.world)


def _remember(parts: Parts, batch: ScoredBatch, record: StepRecord, context: Context) -> None:
    """What the method and the policy keep of this step for the next ones; all ranks call together."""
    run = parts.run
    run.method.objective.remember(batch.tokens, context)
    done = Done(
        step=record.step,
        progress=(record.step + 1) / run.steps,
        rollouts=batch.rollouts,
        probes=record.probes,
        max_new_tokens=run.rollout.max_new_tokens,
        world=parts.world,
    )
    run.policy.remember(done, parts.memory)


def _decoding(parts: Parts, step: int) -> Decoding | None:
    return parts.run.policy.decoding(step / parts.run.steps, parts.memory)


def _sampling(parts: Parts, step: int) -> Sampling | None:
    """How the step's tokens were drawn from the student; None if they were drawn from a blend."""
    decoding = _decoding(parts, step)
    return None if decoding is not None and decoding.blends else parts.run.sampling


def _write(parts: Parts, source: Source, step: int, seconds: dict[str, float]) -> Written:
    """The rollouts of a step, graded if there is a grader.  With staleness, starts the rollouts of the next step."""
    # A sharded teacher that writes is whole for a while: ranks ask it different numbers of times.
    writes = parts.writer is not None or _decoding(parts, step) is not None
    with clock(seconds, "rollout"), parts.teacher.whole() if writes else nullcontext():
        written = source.take(step)
        source.begin(step + 1)
    with clock(seconds, "sync"):
        parts.engine.rest()
    if parts.grader is None:
        return written
    with clock(seconds, "rollout"):
        new = [rollout for rollout in written.rollouts if rollout.reward is None]  # others are used again
        grades = iter(graded(parts.grader, new, parts.tokenizer))
        rollouts = [next(grades) if rollout.reward is None else rollout for rollout in written.rollouts]
        return dataclasses.replace(written, rollouts=rollouts)


def _behind(parts: Parts, step: int, batch: ScoredBatch) -> list[int]:
    """By how many steps the student has moved on since it wrote its rollouts, of all ranks."""
    own = lags(step, batch.rollouts)
    if not parts.run.rollout.staleness and not parts.run.policy.oldest:
        return own
    return [lag for part in parts.world.gather_json(own) for lag in part]


def hand_over(parts: Parts, source: Source, record: StepRecord) -> tuple[StepRecord, EngineError | None]:
    """Give the trained weights to the engine.  Returns the record with the time that this took, and the engine's error
    if it failed."""
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


def _unscored(parts: Parts, rollouts: Sequence[Rollout]) -> ScoredBatch:
    tokens = make_tokens(rollouts, parts.run.seed, parts.learner.device, parts.learner.vocab_size)
    return ScoredBatch(rollouts=tuple(rollouts), tokens=tokens)


@contextmanager
def _keeping(batch: Callable[[], ScoredBatch], parts: Parts, directory: Path, step: int) -> Iterator[None]:
    """If the teacher fails, or numbers are not finite, keep the batch for `tropd inspect`."""
    try:
        yield
    except (TeacherError, TrainingDiverged) as error:
        own = parts.world.own_folder(directory)
        folder = save_batch(own, step, batch())
        raise type(error)(
            f"step {step}: {error} The batch is in {folder}: look at it with `tropd inspect {own} --step {step}`. "
            "The last checkpoint is untouched."
        ) from error


def _over_ranks(sums: StepSums, world: Ranks) -> StepSums:
    """Losses and terms of all ranks; norms and learning rates are the same on each rank."""
    if world.size == 1:
        return sums
    whole = StepSums(gradient_norms=sums.gradient_norms, learning_rate=sums.learning_rate)
    for loss, terms in world.gather_json([sums.loss, {n: dataclasses.asdict(t) for n, t in sums.terms.items()}]):
        whole.add(loss, {name: TermStats(**values) for name, values in terms.items()}, 1.0)
    return whole


def _probes_of_step(
    parts: Parts, sums: StepSums, batch: ScoredBatch, behind: list[int], horizon: int
) -> dict[str, float]:
    """Probes of the whole step: clipping, horizon and age of the rollouts, their rewards, who did not read them."""
    limit = parts.run.optimizer.max_gradient_norm
    probes = {"gradient/clipped": sum(norm > limit for norm in sums.gradient_norms) / len(sums.gradient_norms)}
    if horizon < parts.run.rollout.max_new_tokens:
        probes["rollout/horizon"] = float(horizon)
    if parts.run.policy.oldest:
        again = sum(lag > parts.run.rollout.staleness for lag in behind)
        probes["rollout/replayed"] = again / len(behind) if behind else 0.0
    if parts.run.rollout.staleness or parts.run.policy.oldest:
        probes["staleness/mean"] = sum(behind) / len(behind) if behind else 0.0
        probes["staleness/max"] = float(max(behind, default=0))
    if parts.grader is not None:
        own = [rollout.reward or 0.0 for rollout in _to_the_end(batch)]
        if rewards := [reward for part in parts.world.gather_json(own) for reward in part]:
            probes["reward/mean"] = sum(rewards) / len(rewards)
    for name in (name for name in batch.as_read if _is_told(parts, name)):
        own = [float(read is None) for read in batch.as_read[name]]
        unread = [each for part in parts.world.gather_json(own) for each in part]
        probes[f"unread/{name}"] = sum(unread) / len(unread)
    return probes


def _is_told(parts: Parts, name: str) -> bool:
    """Whether a reader, or one that it is made of, is told something, and so may leave responses unread."""
    reader = parts.readers[name]
    if isinstance(reader, Combined):
        return any(_is_told(parts, part) for part in reader.mixture.readers)
    return name in parts.briefer.told


def _answers(parts: Parts, batch: ScoredBatch) -> Answers | None:
    """The answers of all ranks, if a teacher's moves depend on them; None also where a horizon cut each of them."""
    if not any(follower.rule.reads_answers for follower in parts.followers):
        return None
    own = [(r.reward or 0.0, len(r.response_ids), r.finish == Finish.LENGTH) for r in _to_the_end(batch)]
    if not (rows := [row for part in parts.world.gather_json(own) for row in part]):
        return None
    rewards, lengths, cut = zip(*rows, strict=True)
    return Answers(rewards=rewards, lengths=lengths, cut=cut)


def _to_the_end(batch: ScoredBatch) -> list[Rollout]:
    """The rollouts that no horizon cut: of the others nobody knows what they would have come to."""
    return [rollout for rollout in batch.rollouts if rollout.finish != Finish.HORIZON]


def _count_tokens(batch: ScoredBatch, world: Ranks) -> dict[str, int]:
    authors_N = batch.tokens.authors_N
    own = {
        "prompt": sum(len(rollout.prompt.token_ids) for rollout in batch.rollouts),
        "student": int((authors_N == Author.STUDENT).sum()),
        "teacher": int((authors_N == Author.TEACHER).sum()),
    }
    ranks = world.gather_json(own)
    return {name: sum(part[name] for part in ranks) for name in own}
