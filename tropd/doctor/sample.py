"""A few short rollouts, scored and trained on once in memory, for checks that need measurements.

The diagnosis uses answers that the student writes alone.  The step is the method's step at the end of training, when
prefixes have faded; its result is discarded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tropd.data.graders import graded
from tropd.data.stream import PromptStream
from tropd.doctor.subject import STREAMED
from tropd.errors import DataError
from tropd.methods.drafts import RolloutJob
from tropd.methods.policies import OnPolicy, RolloutPolicy
from tropd.model.forward import similar_lengths
from tropd.monitoring.probes import probe_batch
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.rollout.stage import roll_out
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.training.batches import add_scores, make_tokens
from tropd.training.iteration import clock
from tropd.training.scoring import asked_of, score
from tropd.training.step import StepSums, recall_needed, train_step
from tropd.types import READER, Finish, Prompt, Rollout

if TYPE_CHECKING:
    from tropd.training.assembly import Parts

_EVIDENCE = Needs.SAMPLED | Needs.TOPK | Needs.TEACHER_ENTROPY
_TOP_K = 64  # TrOPD's, if the method has no top-k


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """A teacher's scores of answers to its prompts.  x = log pi_T - log pi_S of a written token."""

    teacher: Teacher
    rollouts: list[Rollout]
    limit: int
    """Tokens that an answer could have."""
    probes: dict[str, float]
    stop_ratios: list[float]
    """x at the token that ended an answer."""
    other_ratio: float
    """Mean x of all other tokens."""
    sampler_gap: tuple[float, float]
    """Mean and largest |log pi_S of the sampler - log pi_S of the trainer|."""
    repeat_gap: float
    """Largest difference when the teacher scores the same texts again, in another order."""

    @property
    def num_ended(self) -> int:
        return sum(rollout.finish is Finish.STOP for rollout in self.rollouts)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The measurements."""

    rollouts: list[Rollout]
    limit: int
    """Tokens that an answer could have."""
    diagnoses: dict[str, Diagnosis]
    """By teacher."""
    step: StepSums
    seconds: dict[str, float]
    num_tokens: int
    """Prompt and response tokens of the step."""

    @property
    def lengths(self) -> list[int]:
        return [len(rollout.response_ids) for rollout in self.rollouts]


def draw_sample(parts: Parts, num_prompts: int, max_new_tokens: int) -> Sample:
    """Answers to `num_prompts` prompts of each teacher."""
    seconds: dict[str, float] = {}
    prompts = _prompts(parts, num_prompts)
    limit = min(max_new_tokens, parts.run.rollout.max_new_tokens)
    with clock(seconds, "rollout"):
        rollouts = _write(parts, prompts, OnPolicy(), limit)
    if parts.grader is not None:
        rollouts = graded(parts.grader, rollouts, parts.tokenizer)
    rollouts, as_read = _read(parts, rollouts)
    diagnoses = {}
    for chosen, teacher in parts.teacher.parts(rollouts):
        if Needs.SAMPLED not in teacher.capabilities:  # it only writes: there are no numbers to look at
            continue
        answers, told = [rollouts[i] for i in chosen], [as_read[i] for i in chosen]
        diagnoses[answers[0].prompt.teacher] = _diagnose(parts, teacher, answers, told, limit)
    step_rollouts = rollouts
    if parts.run.policy != OnPolicy():
        step_rollouts = _write(parts, prompts, parts.run.policy, limit)
        if parts.grader is not None:
            step_rollouts = graded(parts.grader, step_rollouts, parts.tokenizer)
    if Needs.CHUNKS in parts.objective.needs:  # every call may cost something
        step_rollouts = step_rollouts[:1]
    return Sample(
        rollouts=rollouts,
        limit=limit,
        diagnoses=diagnoses,
        step=_step(parts, step_rollouts, seconds),
        seconds=seconds,
        num_tokens=sum(len(r.token_ids) for r in step_rollouts),
    )


def _read(parts: Parts, rollouts: list[Rollout]) -> tuple[list[Rollout], list[Rollout]]:
    """The answers that the teacher reads, and how it reads them."""
    as_read = parts.briefer.as_read(READER, rollouts)
    pairs = [(rollout, read) for rollout, read in zip(rollouts, as_read, strict=True) if read is not None]
    if not pairs:
        raise DataError(
            f"the teacher is told nothing of any of {len(rollouts)} answers, so it would teach nothing: its briefing "
            "found nothing to say, or does not fit what it can read. Look at the grader's rewards and words."
        )
    return [rollout for rollout, _ in pairs], [read for _, read in pairs]


def _prompts(parts: Parts, num_prompts: int) -> list[tuple[Prompt, int]]:
    """The next prompts for each teacher, from a limited number if not all are in memory."""
    stream = parts.stream
    before = stream.state_dict()
    if not parts.run.teachers:
        drawn = stream.next(num_prompts)
    else:
        left = dict.fromkeys(parts.run.teachers, num_prompts)
        drawn = []
        for prompt, visit in stream.next(len(stream) if isinstance(stream, PromptStream) else STREAMED):
            if left.get(prompt.teacher, 0) > 0:
                left[prompt.teacher] -= 1
                drawn.append((prompt, visit))
    stream.load_state_dict(before)
    return drawn


def _write(parts: Parts, prompts: Sequence[tuple[Prompt, int]], policy: RolloutPolicy, limit: int) -> list[Rollout]:
    run, grader = parts.run, parts.grader
    job = RolloutJob(
        prompts=prompts,
        num_rollouts=2 if parts.briefer.compares else 1,
        max_new_tokens=min(limit, policy.horizon(run.rollout.max_new_tokens, run.steps - 1, 1.0, parts.memory)),
        budget=limit,
        sampling=run.sampling,
        stop_ids=parts.stop_ids,
        seed=run.seed,
        progress=1.0,
        memory=parts.memory,
        grade=None if grader is None else lambda rollouts: graded(grader, rollouts, parts.tokenizer),
        teacher_sampling=run.rollout.teacher_sampling,
    )
    return roll_out(policy, job, parts.engine, parts.writer, parts.pair)


def _diagnose(parts: Parts, teacher: Teacher, rollouts: list[Rollout], as_read: list[Rollout], limit: int) -> Diagnosis:
    """The numbers of both models for these answers, as probes."""
    top_k = min(parts.objective.teacher_top_k or _TOP_K, parts.vocab_size)
    request = ScoreRequest(as_read, _EVIDENCE & teacher.capabilities, top_k=top_k)
    tokens = make_tokens(rollouts, parts.run.seed, parts.learner.device, parts.vocab_size)
    tokens = add_scores(tokens, rollouts, teacher.score(request), request.needs)
    sampler_N = tokens.peek("student_logprobs_N")
    own = _measure(parts, rollouts, tokens.peek("teacher_topk_ids_NK"), top_k)
    tokens = tokens.with_(
        student_logprobs_N=own["logprobs"], student_entropy_N=own["entropy"], student_topk_ids_NJ=own["ids"]
    )
    probes = probe_batch(tokens, rollouts, topk_logprobs_NK=own.get("at_teacher"), sampling=parts.run.sampling).result()
    last_S = torch.tensor([len(r.response_ids) for r in rollouts]).cumsum(0) - 1
    ends_S = last_S[torch.tensor([r.finish is Finish.STOP for r in rollouts])]
    ratio_N = tokens.log_ratio_N.cpu()
    other_N = torch.ones_like(ratio_N, dtype=torch.bool).index_fill(0, ends_S, False) & ratio_N.isfinite()
    other = float(ratio_N[other_N].mean()) if bool(other_N.any()) else 0.0
    gap_N = torch.zeros(1) if sampler_N is None else (sampler_N - own["logprobs"]).abs().float()
    return Diagnosis(
        teacher=teacher,
        rollouts=rollouts,
        limit=limit,
        probes=probes,
        stop_ratios=ratio_N[ends_S].tolist(),
        other_ratio=other,
        sampler_gap=(float(gap_N.mean()), float(gap_N.max())),
        repeat_gap=_repeat(teacher, as_read),
    )


def _measure(parts: Parts, rollouts: list[Rollout], ids_NK: Tensor | None, top_k: int) -> dict[str, Tensor]:
    """The student's measurements, in batches of similar length, rows in the order of the rollouts."""
    lengths = [len(r.response_ids) for r in rollouts]
    ids_by_rollout = [] if ids_NK is None else ids_NK.split(lengths)
    pieces: dict[int, dict[str, Tensor]] = {}
    for group in similar_lengths([len(r.token_ids) for r in rollouts], parts.run.tokens_per_micro_batch):
        found = parts.learner.forward.measure(
            [rollouts[i] for i in group],
            Needs.STUDENT_ENTROPY,
            top_k=top_k,
            at_ids_NJ=torch.cat([ids_by_rollout[i] for i in group]) if ids_by_rollout else None,
        )
        columns = {
            "logprobs": found.logprobs_N,
            "entropy": found.entropy_N,
            "ids": found.topk_ids_NK,
            "at_teacher": found.at_logprobs_NJ,
        }
        for name, x in columns.items():
            if x is None:  # no top-k of the teacher's, so nothing at it
                continue
            for i, rows in zip(group, x.split([lengths[i] for i in group]), strict=True):
                pieces.setdefault(i, {})[name] = rows
    return {name: torch.cat([pieces[i][name] for i in range(len(rollouts))]) for name in pieces[0]}


def _repeat(teacher: Teacher, rollouts: list[Rollout]) -> float:
    """A teacher must give the same scores for the same text in any request."""
    first = teacher.score(ScoreRequest(rollouts))
    again = teacher.score(ScoreRequest(rollouts[::-1]))[::-1]
    gaps = [(a.logprobs_T - b.logprobs_T).abs() for a, b in zip(first, again, strict=True) if len(a.logprobs_T)]
    finite = [gap_T[gap_T.isfinite()] for gap_T in gaps]
    return max((float(gap_T.max()) for gap_T in finite if len(gap_T)), default=0.0)


def _step(parts: Parts, rollouts: list[Rollout], seconds: dict[str, float]) -> StepSums:
    run, objective, learner = parts.run, parts.objective, parts.learner
    with clock(seconds, "score"):
        recall = recall_needed(objective, run.optimizer.num_updates)
        asked = asked_of(objective, parts.readers)
        as_read = {name: parts.briefer.as_read(name, rollouts) for name in asked}
        batch = score(rollouts, objective, parts.readers, learner, seed=run.seed, recall=recall, as_read=as_read)
    with clock(seconds, "train"):
        return train_step(
            batch,
            objective,
            learner,
            Context(progress=1.0),
            tokens_per_micro_batch=run.tokens_per_micro_batch,
            teacher=parts.readers,
        )
