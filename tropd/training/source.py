"""Where the rollouts of a step come from: written now, or ahead, while the previous step was trained.

    this process   score and train on batch t ------------------------------> wait, sync the weights of t + 1
    servers        batch t + 1 with the weights of t; a teacher on servers scores it as well

That is rollout.staleness = 1.  Every batch except the first is one step older than the student that it trains.  Weights
change only between batches, so the weights that wrote a token do not depend on timing.  Importance ratios use the
log-probabilities with which the tokens were drawn.  A checkpoint holds the prompt cursor as of the trained batches, and
the batch that is not trained yet, so a resumed run does not draw it again from newer weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from tropd.base.background import in_background
from tropd.base.fast_paths import TAKEN, FastPath
from tropd.data.graders import graded
from tropd.data.stream import PromptStream, name_of
from tropd.errors import CheckpointError, ConfigError, TeacherError
from tropd.methods.drafts import RolloutJob, drafts_of
from tropd.methods.packed import pack, unpack
from tropd.objective.evidence import OF_TEACHER
from tropd.objective.memory import Memory
from tropd.rollout.stage import begin, carry_on, joined, roll_out
from tropd.teachers.teacher import ScoreRequest
from tropd.training.assembly import Parts
from tropd.types import READER, Author, Prompt, Rollout, TeacherScores

log = logging.getLogger("tropd.rollout")


@dataclass(frozen=True, kw_only=True)
class Written:
    """The rollouts of a step."""

    rollouts: list[Rollout]
    horizon: int
    """How many tokens a response could have."""
    scores: list[TeacherScores] | None = None
    """The teacher's scores, if it has been asked already."""


class Source:
    """Gives batches in the order of the prompts.  Nothing runs in the background unless `begin` was called."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self._next: Future[Written] | None = None
        self._cursor: dict[str, Any] = {}
        """The prompt cursor before the prompts of `_next`."""
        self._taken: tuple[dict[str, Any], Written | None] = ({}, None)
        """The cursor before the last step, and its rollouts if they were written ahead."""

    def take(self, step: int) -> Written:
        """The rollouts of a step."""
        parts, run = self.parts, self.parts.run
        if self._next is None:
            self._taken = (parts.stream.state_dict(), None)
            job = self._job(step)
            rollouts = roll_out(run.policy, job, parts.engine, parts.writer, parts.pair)
            return Written(rollouts=rollouts, horizon=job.max_new_tokens)
        self._taken = (self._cursor, None)
        written, self._next = self._next.result(), None
        self._taken = (self._cursor, written)
        oldest = max(run.rollout.staleness, run.policy.oldest)
        assert max(lags(step, written.rollouts), default=0) <= oldest, "staleness is bounded"
        return written

    def begin(self, step: int) -> None:
        """With staleness, start the rollouts of the next step in the background."""
        parts, run = self.parts, self.parts.run
        if run.rollout.staleness == 0 or step >= run.steps:
            return
        TAKEN.add(FastPath.WRITING_AHEAD)
        self._cursor = parts.stream.state_dict()
        job = self._job(step)
        if parts.teacher.elsewhere:
            self._next = in_background(lambda: self._from_afar(job))
            return
        kept = run.policy.again(job)
        new = job.without(kept)
        drafts = begin(run.policy, new, parts.writer)  # a teacher in this process writes in this thread

        def write() -> Written:
            rollouts = joined(job, kept, carry_on(drafts, new, parts.engine))
            return Written(rollouts=_aged(rollouts), horizon=job.max_new_tokens)

        self._next = in_background(write)

    def wait(self) -> None:
        """Wait until the engine is idle.  `take` raises its errors, in the step that needs the batch."""
        if self._next is not None:
            futures.wait([self._next])

    def state_dict(self) -> dict[str, Any]:
        """The cursor before all prompts that are not trained yet, and their rollouts if they are written."""
        if self._next is None:
            return self.parts.stream.state_dict()
        self.wait()
        if self._next.exception() is not None:
            return self._cursor
        return _with_ahead(self._cursor, self._next.result())

    def state_before(self) -> dict[str, Any]:
        """`state_dict` as it was before the last step, which failed."""
        cursor, written = self._taken
        return cursor if written is None else _with_ahead(cursor, written)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        stream, wanted = self.parts.stream, self.parts.run.rollout
        stream.load_state_dict(state)
        held = state.get("ahead")
        if held is None:
            return
        self._cursor = stream.state_dict()
        drafts = drafts_of(stream.next(wanted.num_prompts), wanted.num_rollouts)
        prompts = [d.prompt if d.id == one["id"] else self._recall(one) for d, one in zip(drafts, held, strict=False)]
        if len(drafts) != len(held) or [name_of(p) if p else "" for p in prompts] != [one["prompt"] for one in held]:
            raise CheckpointError(
                "the rollouts that were written ahead do not belong to the prompts that come next. Resume from another "
                "checkpoint with --step."
            )
        self._next = Future()
        rollouts = [unpack(one, prompt) for one, prompt in zip(held, prompts, strict=True) if prompt is not None]
        self._next.set_result(Written(rollouts=rollouts, horizon=state.get("horizon", wanted.max_new_tokens)))

    def _recall(self, held: Mapping[str, Any]) -> Prompt | None:
        """The prompt of a rollout that is used again."""
        known = self.parts.stream if isinstance(self.parts.stream, PromptStream) else None
        return known.find(held["prompt_id"]) if known and self.parts.run.policy.oldest else None

    def _from_afar(self, job: RolloutJob) -> Written:
        """Rollouts and scores, all by servers, so that nothing in this process is touched while it trains."""
        parts, objective = self.parts, self.parts.objective
        rollouts = _aged(roll_out(parts.run.policy, job, parts.engine, parts.writer))
        needs = objective.needs_of(READER)
        if not needs & OF_TEACHER:
            return Written(rollouts=rollouts, horizon=job.max_new_tokens)
        if parts.briefer.needs(READER):  # the teacher is told what a grader will say of them
            return Written(rollouts=rollouts, horizon=job.max_new_tokens)
        as_read = [read for read in parts.briefer.as_read(READER, rollouts) if read is not None]
        if len(as_read) < len(rollouts):
            return Written(rollouts=rollouts, horizon=job.max_new_tokens)
        try:
            scores = parts.teacher.score(ScoreRequest(as_read, needs, top_k=objective.top_k_of(READER)))
        except TeacherError as error:
            log.warning("%s It is asked again when the step comes.", error)
            scores = None
        return Written(rollouts=rollouts, scores=scores, horizon=job.max_new_tokens)

    def _job(self, step: int) -> RolloutJob:
        parts, run = self.parts, self.parts.run
        prompts = parts.stream.next(run.rollout.num_prompts)
        return RolloutJob(
            prompts=[prompts[p] for p in own_prompts(parts)],
            batch=prompts,
            num_rollouts=run.rollout.num_rollouts,
            max_new_tokens=_horizon(parts, step),
            budget=run.rollout.max_new_tokens,
            sampling=run.sampling,
            stop_ids=parts.stop_ids,
            seed=run.seed,
            progress=step / run.steps,
            step=step,
            memory=Memory(parts.memory),  # as it is now, also where rollouts are written ahead
            recall=parts.stream.find if isinstance(parts.stream, PromptStream) else None,
            grade=grade_of(parts),
            teacher_sampling=run.rollout.teacher_sampling,
        )


def grade_of(parts: Parts) -> Callable[[Sequence[Rollout]], Sequence[Rollout]] | None:
    grader = parts.grader
    return None if grader is None else lambda rollouts: graded(grader, rollouts, parts.tokenizer)


def _horizon(parts: Parts, step: int) -> int:
    """How many tokens the policy has written of each response in this step."""
    most = parts.run.rollout.max_new_tokens
    asked = parts.run.policy.horizon(most, step, step / parts.run.steps, parts.memory)
    if not 1 <= asked <= most:
        raise ConfigError(
            f"the rollout policy asks for responses of {asked} tokens, but a response has 1 to {most} "
            "(rollout.max_new_tokens)."
        )
    return asked


def own_prompts(parts: Parts) -> list[int]:
    """The indices of this rank's prompts within a step."""
    return parts.world.share(range(parts.run.rollout.num_prompts))


def own_places(parts: Parts) -> list[int]:
    """The indices of this rank's rollouts within a step."""
    each = parts.run.rollout.num_rollouts
    return [n * each + i for n in own_prompts(parts) for i in range(each)]


def lags(step: int, rollouts: Sequence[Rollout]) -> list[int]:
    """For each rollout of the student: how many steps its weights are behind."""
    return [step - r.policy_version[0] for r in rollouts if Author.STUDENT in r.authors]


def _aged(rollouts: list[Rollout]) -> list[Rollout]:
    """Drop the student's own log-probabilities: by the time of training the student has changed."""
    return [dataclasses.replace(rollout, model_logprobs=()) for rollout in rollouts]


def _with_ahead(cursor: Mapping[str, Any], written: Written) -> dict[str, Any]:
    ahead = [{**pack(rollout), "prompt": name_of(rollout.prompt)} for rollout in written.rollouts]
    return {**cursor, "ahead": ahead, "horizon": written.horizon}
