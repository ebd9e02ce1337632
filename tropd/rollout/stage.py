"""Roll out: prompts in, rollouts out, whoever writes which token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tropd.errors import ConfigError
from tropd.methods.policies import Mixture, OnPolicy, RolloutPolicy, TeacherPrefix, TeacherText
from tropd.rollout.engine import Engine
from tropd.types import Author, Completion, Finish, Prompt, Request, Rollout, Sampling, key_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutJob:
    """What to write: `num_rollouts` responses to each prompt of one step."""

    prompts: Sequence[tuple[Prompt, int]]
    """Prompts with the number of the epoch they are visited in."""
    batch: Sequence[tuple[Prompt, int]] = ()
    """All prompts of the step, where `prompts` are one rank's."""
    num_rollouts: int
    max_new_tokens: int
    sampling: Sampling
    stop_ids: tuple[int, ...]
    seed: int
    progress: float
    teacher_sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Draft:
    """A rollout before the student writes: its name, its prompt and what the teacher has written of it."""

    id: str
    prompt: Prompt
    prefix: tuple[int, ...]
    whole: bool = False
    """The teacher wrote everything; nothing is left to the student."""
    finish: Finish = Finish.STOP


def roll_out(policy: RolloutPolicy, job: RolloutJob, student: Engine, writer: Engine | None) -> list[Rollout]:
    """Carry out a policy.  `writer` is the teacher's engine, asked only where the teacher writes."""
    return carry_on(begin(policy, job, writer), job, student)


def names_of(prompts: Sequence[tuple[Prompt, int]], num_rollouts: int) -> list[tuple[str, Prompt, int]]:
    """The rollouts of prompts and their visits: id, prompt and number among those of the prompt."""
    return [(f"{visit}/{p.id}/{i}", p, i) for p, visit in prompts for i in range(num_rollouts)]


def begin(policy: RolloutPolicy, job: RolloutJob, writer: Engine | None) -> list[Draft]:
    """All that stands before what the student writes."""
    return _draft(policy, job, names_of(job.prompts, job.num_rollouts), writer)


def carry_on(drafts: Sequence[Draft], job: RolloutJob, student: Engine) -> list[Rollout]:
    """What the student writes after that."""
    open_drafts = [d for d in drafts if not d.whole]
    requests = [
        Request(
            token_ids=d.prompt.token_ids + d.prefix,
            max_new_tokens=job.max_new_tokens - len(d.prefix),
            seed=key_of(job.seed, "student", d.id),
            sampling=job.sampling,
            stop_ids=job.stop_ids,
        )
        for d in open_drafts
    ]
    written = iter(student.generate(requests) if requests else [])
    return [_finished(d) if d.whole else _continued(d, next(written)) for d in drafts]


def _draft(
    policy: RolloutPolicy, job: RolloutJob, names: list[tuple[str, Prompt, int]], writer: Engine | None
) -> list[Draft]:
    if isinstance(policy, OnPolicy):
        return [Draft(id, prompt, ()) for id, prompt, _ in names]
    if isinstance(policy, TeacherPrefix):
        return _prefixed(policy, job, names, writer)
    if isinstance(policy, TeacherText | Mixture):
        share = policy.student_share if isinstance(policy, Mixture) else 0.0
        coin = policy.coin if isinstance(policy, Mixture) else "rollout"
        whole = job.batch or job.prompts
        batch_name = "/".join(f"{visit}/{p.id}/{i}" for p, visit in whole for i in range(job.num_rollouts))
        by_student = [_unit(job.seed, "mixture", batch_name if coin == "batch" else id) < share for id, _, _ in names]
        texts = iter(_teacher_texts([n for n, own in zip(names, by_student, strict=True) if not own], job, writer))
        drafts = []
        for (id, prompt, _), own in zip(names, by_student, strict=True):
            if own:
                drafts.append(Draft(id, prompt, ()))
            else:
                ids, finish = next(texts)
                drafts.append(Draft(id, prompt, ids, whole=True, finish=finish))
        return drafts
    raise ConfigError(f"the rollout stage does not know the policy {type(policy).__name__}.")


def _prefixed(
    policy: TeacherPrefix, job: RolloutJob, names: list[tuple[str, Prompt, int]], writer: Engine | None
) -> list[Draft]:
    longest = int(policy.length(job.progress) * job.max_new_tokens)
    wanted = [longest > 0 and _unit(job.seed, "prefix?", id) < policy.share for id, _, _ in names]
    shared = policy.texts == "shared"
    asked = [n for n, yes in zip(names, wanted, strict=True) if yes]
    sources = {(_text_name(id) if shared else id): (id, prompt, i) for id, prompt, i in asked}
    texts = dict(zip(sources, _teacher_texts(list(sources.values()), job, writer, shared), strict=True))
    drafts = []
    for (id, prompt, _), yes in zip(names, wanted, strict=True):
        if not yes:
            drafts.append(Draft(id, prompt, ()))
            continue
        ids, finish = texts[_text_name(id) if shared else id]
        limit = longest
        if policy.draw == "uniform":
            limit = int(_unit(job.seed, "prefix length", id) * (longest + 1))
        # A stop token inside the prefix would leave the student nothing to write after it.
        whole = limit >= len(ids) and policy.keep == 0 and finish == Finish.STOP
        room = len(ids) if policy.keep == 0 else max(len(ids) - policy.keep, 0)
        prefix = ids[: min(limit, room, job.max_new_tokens - (0 if whole else 1))]
        drafts.append(Draft(id, prompt, prefix, whole=whole and len(prefix) == len(ids), finish=finish))
    return drafts


def _text_name(id: str) -> str:
    """All rollouts of one visit to a prompt share a text: the id without the sample number."""
    return id.rsplit("/", 1)[0]


def _teacher_texts(
    names: list[tuple[str, Prompt, int]], job: RolloutJob, writer: Engine | None, shared: bool = False
) -> list[tuple[tuple[int, ...], Finish]]:
    """The teacher's responses; a response that the dataset brings is taken instead of asking.

    The seed leaves out the visit, so a prompt keeps its texts in every epoch and a cache of them can hit.
    """
    own = {n: _given(prompt, job) for n, (_, prompt, _) in enumerate(names) if prompt.response_ids}
    rest = [n for n in range(len(names)) if n not in own]
    if rest and writer is None:
        raise ConfigError(
            "this method needs texts that the teacher writes, but the teacher cannot write and "
            f"{len(rest)} of {len(names)} prompts bring no response. Use a teacher that generates, a dataset with "
            "responses, or a method without prefixes (--method.no-guidance for tropd)."
        )
    requests = [
        Request(
            token_ids=names[n][1].token_ids,
            max_new_tokens=job.max_new_tokens,
            seed=key_of(job.seed, "teacher", names[n][1].id, 0 if shared else names[n][2]),
            sampling=job.teacher_sampling,
            stop_ids=job.stop_ids,
            teacher=names[n][1].teacher,
        )
        for n in rest
    ]
    completions = writer.generate(requests) if writer is not None and requests else []
    own |= {n: (c.token_ids, c.finish) for n, c in zip(rest, completions, strict=True)}
    return [own[n] for n in range(len(names))]


def _given(prompt: Prompt, job: RolloutJob) -> tuple[tuple[int, ...], Finish]:
    """The data set's response as an engine would have written it: up to its first stop token, or to the limit."""
    ends = [t for t, token in enumerate(prompt.response_ids) if token in job.stop_ids]
    text = prompt.response_ids[: ends[0] + 1] if ends else prompt.response_ids
    fits = len(text) <= job.max_new_tokens
    return text[: job.max_new_tokens], Finish.STOP if fits else Finish.LENGTH


def _unit(seed: int, *parts: object) -> float:
    """A number in [0, 1) that belongs to its name."""
    return (key_of(seed, *parts) & (2**53 - 1)) / 2**53


def _finished(draft: Draft) -> Rollout:
    prompt, n = draft.prompt, len(draft.prefix)
    return Rollout(
        id=draft.id,
        prompt=prompt,
        token_ids=prompt.token_ids + draft.prefix,
        authors=(Author.CONTEXT,) * len(prompt.token_ids) + (Author.TEACHER,) * n,
        behavior_logprobs=(0.0,) * (len(prompt.token_ids) + n),
        finish=draft.finish,
    )


def _continued(draft: Draft, completion: Completion) -> Rollout:
    prompt, given, new = draft.prompt, len(draft.prefix), len(completion.token_ids)
    silent = (0.0,) * (len(prompt.token_ids) + given)
    return Rollout(
        id=draft.id,
        prompt=prompt,
        token_ids=prompt.token_ids + draft.prefix + completion.token_ids,
        authors=(Author.CONTEXT,) * len(prompt.token_ids) + (Author.TEACHER,) * given + (Author.STUDENT,) * new,
        behavior_logprobs=silent + completion.behavior_logprobs,
        model_logprobs=silent + completion.model_logprobs if completion.model_logprobs else (),
        policy_version=completion.policy_version,
        finish=completion.finish,
    )


Grade = Callable[[Sequence[Rollout]], list[float]]
"""A grader bound to its tokenizer."""
