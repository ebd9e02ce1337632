"""Roll out: from prompts to rollouts.  A policy says which tokens the teacher writes and which the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from tropd.errors import ConfigError
from tropd.methods.decoding import Decoding
from tropd.methods.drafts import Draft, RolloutJob, Writer
from tropd.methods.policies import RolloutPolicy
from tropd.rollout.engine import Engine
from tropd.types import Author, Completion, Request, Rollout, key_of


class Pair(Protocol):
    """Student and teacher, writing together."""

    def write(
        self, requests: Sequence[Request], told: Sequence[tuple[int, ...]], decoding: Decoding
    ) -> list[Completion]:
        """One completion per request; `told` is what the teacher reads in the place of each request's prompt."""
        ...


def roll_out(
    policy: RolloutPolicy, job: RolloutJob, student: Engine, writer: Writer | None, pair: Pair | None = None
) -> list[Rollout]:
    """Carry out a policy.  `writer` is the teacher's engine, used only if the teacher writes; `pair` is used if it has
    a say in each token."""
    kept, decoding = policy.again(job), policy.decoding(job.progress, job.memory)
    new = job.without(kept)
    return joined(job, kept, carry_on(begin(policy, new, writer), new, student, decoding, pair))


def joined(job: RolloutJob, kept: Mapping[str, Sequence[Rollout]], new: Sequence[Rollout]) -> list[Rollout]:
    """The rollouts of a job, in its order: those of some visits are kept from earlier steps, the others are new."""
    rest, rollouts = iter(new), []
    for prompt, visit in job.prompts:
        rollouts += kept.get(f"{visit}/{prompt.id}") or [next(rest) for _ in range(job.num_rollouts)]
    return rollouts


def begin(policy: RolloutPolicy, job: RolloutJob, writer: Writer | None) -> list[Draft]:
    """Everything before the student's tokens; drafts that a student could not continue are refused."""
    drafts, name = policy.begin(job, writer), type(policy).__name__
    if [draft.id for draft in drafts] != [draft.id for draft in job.drafts()]:
        raise ConfigError(
            f"{name}.begin gave {len(drafts)} drafts that are not the {job.num_rollouts} rollouts of each of the "
            f"{len(job.prompts)} prompts. Return job.drafts() in its order, each with its prefix."
        )
    for draft in drafts:
        most = job.max_new_tokens - (0 if draft.whole else 1)
        if len(draft.prefix) > most:
            raise ConfigError(
                f"{name}.begin gave rollout {draft.id} a prefix of {len(draft.prefix)} tokens, but it may have {most} "
                f"of the {job.max_new_tokens} of a response. Use draft.begun(text, length, job.max_new_tokens)."
            )
    return drafts


def carry_on(
    drafts: Sequence[Draft],
    job: RolloutJob,
    student: Engine,
    decoding: Decoding | None = None,
    pair: Pair | None = None,
) -> list[Rollout]:
    """The rollouts, with the student's continuations of the drafts."""
    open_drafts = [d for d in drafts if not d.whole]
    requests = [
        Request(
            token_ids=d.prompt.token_ids + d.prefix,
            max_new_tokens=job.max_new_tokens - len(d.prefix),
            seed=key_of(job.seed, "student", d.id),
            sampling=job.sampling,
            stop_ids=job.stop_ids,
            teacher=d.prompt.teacher,
        )
        for d in open_drafts
    ]
    if decoding is None:
        completions = student.generate(requests) if requests else []
    elif pair is None:
        raise ConfigError(
            "the rollout policy draws each token from student and teacher together, which needs a teacher in this "
            "process. Set teacher.path instead of teacher.servers, or use another policy."
        )
    else:
        told = [(d.prompt.told.get("teacher") or d.prompt.token_ids) + d.prefix for d in open_drafts]
        completions = pair.write(requests, told, decoding) if requests else []
    written = iter(completions)
    rollouts = [d.rollout() if d.whole else _continued(d, next(written)) for d in drafts]
    return [replace(r, finish=job.end(r.finish)) for r in rollouts]


def _continued(draft: Draft, completion: Completion) -> Rollout:
    prompt, given, new = draft.prompt, len(draft.prefix), len(completion.token_ids)
    silent = (0.0,) * (len(prompt.token_ids) + given)
    return Rollout(
        id=draft.id,
        prompt=prompt,
        token_ids=prompt.token_ids + draft.prefix + completion.token_ids,
        authors=(Author.CONTEXT,) * len(prompt.token_ids)
        + (Author.TEACHER,) * given
        + (completion.authors or (Author.STUDENT,) * new),
        behavior_logprobs=silent + completion.behavior_logprobs,
        model_logprobs=silent + completion.model_logprobs if completion.model_logprobs else (),
        policy_version=completion.policy_version,
        finish=completion.finish,
        trace=completion.trace,
    )
