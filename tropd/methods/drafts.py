"""What stands before the student writes: the rollouts of a step as drafts, and the teacher's texts that begin them.

    job.drafts() --> a policy adds prefixes --> the student goes on from each draft

Everything a rollout draws belongs to its name (epoch / prompt / number), so it does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from tropd.errors import ConfigError
from tropd.objective.memory import Memory
from tropd.types import Author, Completion, Finish, Prompt, Request, Rollout, Sampling, key_of


class Writer(Protocol):
    """What writes the teacher's texts: any engine of `tropd.rollout`."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


@dataclass(frozen=True, slots=True)
class Text:
    """A response that the teacher, or the data set, has written."""

    token_ids: tuple[int, ...]
    finish: Finish


@dataclass(frozen=True, slots=True)
class Draft:
    """A rollout before the student writes: its name, its prompt and what the teacher has written of it."""

    id: str
    prompt: Prompt
    number: int = 0
    """Among the rollouts of its prompt."""
    prefix: tuple[int, ...] = ()
    whole: bool = False
    """The teacher wrote everything; nothing is left to the student."""
    finish: Finish = Finish.STOP
    """Of a whole draft."""

    @property
    def visit(self) -> str:
        """The name that all rollouts of one visit to a prompt share."""
        return self.id.rsplit("/", 1)[0]

    def written(self, text: Text) -> Draft:
        """With a text as the whole response."""
        return replace(self, prefix=text.token_ids, whole=True, finish=text.finish)

    def rollout(self) -> Rollout:
        """Of a whole draft."""
        prompt, n = self.prompt, len(self.prefix)
        return Rollout(
            id=self.id,
            prompt=prompt,
            token_ids=prompt.token_ids + self.prefix,
            authors=(Author.CONTEXT,) * len(prompt.token_ids) + (Author.TEACHER,) * n,
            behavior_logprobs=(0.0,) * (len(prompt.token_ids) + n),
            finish=self.finish,
        )

    def begun(self, text: Text, length: int, max_new_tokens: int, keep: int = 1) -> Draft:
        """With the first `length` tokens of a text.  The student writes at least one token, and the last `keep` of the
        text: a stop token inside the prefix would leave nothing to write.  With `keep` = 0 a finished text may be the
        whole response."""
        whole = length >= len(text.token_ids) and keep == 0 and text.finish == Finish.STOP
        room = max(len(text.token_ids) - keep, 0)
        prefix = text.token_ids[: min(length, room, max_new_tokens - (0 if whole else 1))]
        return replace(self, prefix=prefix, whole=whole and len(prefix) == len(text.token_ids), finish=text.finish)


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutJob:
    """What to write: `num_rollouts` responses to each prompt of one step."""

    prompts: Sequence[tuple[Prompt, int]]
    """Prompts with the number of the epoch they are visited in."""
    batch: Sequence[tuple[Prompt, int]] = ()
    """All prompts of the step, where `prompts` are one rank's."""
    num_rollouts: int
    max_new_tokens: int
    """Of a response, up to the policy's horizon."""
    budget: int | None = None
    """The same without a horizon, where there is one."""
    sampling: Sampling
    stop_ids: tuple[int, ...]
    seed: int
    progress: float
    step: int = 0
    teacher_sampling: Sampling = Sampling()
    memory: Memory = field(default_factory=Memory)
    """What the run remembers, as of the last step that was trained.  A policy reads it here and changes it in
    `remember`."""
    recall: Callable[[str], Prompt | None] | None = None
    """A prompt of the data by its id; None where the data are streamed."""
    grade: Callable[[Sequence[Rollout]], Sequence[Rollout]] | None = None
    """The same rollouts with the grader's rewards; None where the run has no grader."""

    def drafts(self) -> list[Draft]:
        """All rollouts, none of them begun."""
        return drafts_of(self.prompts, self.num_rollouts)

    def without(self, visits: Container[str]) -> RolloutJob:
        """The same for its other prompts; a visit is called epoch / prompt."""
        left = [(prompt, visit) for prompt, visit in self.prompts if f"{visit}/{prompt.id}" not in visits]
        return replace(self, prompts=left, batch=self.batch or self.prompts)

    def draw(self, what: str, name: str) -> float:
        """A number in [0, 1) that belongs to a name, such as a draft's id, and to what it decides."""
        return (key_of(self.seed, what, name) & (2**53 - 1)) / 2**53

    def end(self, finish: Finish) -> Finish:
        """Why a response of this job ended: one that is as long as it may be may have come to the horizon alone."""
        cut = finish == Finish.LENGTH and self.budget is not None and self.max_new_tokens < self.budget
        return Finish.HORIZON if cut else finish

    @property
    def batch_name(self) -> str:
        """The same on all ranks."""
        return "/".join(draft.id for draft in drafts_of(self.batch or self.prompts, self.num_rollouts))


def drafts_of(prompts: Sequence[tuple[Prompt, int]], num_rollouts: int) -> list[Draft]:
    """The rollouts of prompts and their visits."""
    return [Draft(f"{visit}/{p.id}/{i}", p, i) for p, visit in prompts for i in range(num_rollouts)]


def teacher_texts(
    drafts: Sequence[Draft], job: RolloutJob, writer: Writer | None, *, shared: bool = False
) -> list[Text]:
    """A text for each draft, `shared` by all rollouts of a prompt where that is asked for.  A response that the data
    set brings is taken instead of asking.

    The seed leaves out the visit, so a prompt keeps its texts in every epoch and a cache of them can hit.
    """
    wanted = {(draft.visit if shared else draft.id): draft for draft in drafts}
    texts = {name: _given(draft.prompt, job) for name, draft in wanted.items() if draft.prompt.response_ids}
    rest = {name: draft for name, draft in wanted.items() if name not in texts}
    if rest and writer is None:
        raise ConfigError(
            "this method needs texts that the teacher writes, but the teacher cannot write and "
            f"{len(rest)} of {len(wanted)} prompts bring no response. Use a teacher that generates, a dataset with "
            "responses, or a method without prefixes (--method.no-guidance for tropd)."
        )
    requests = [
        Request(
            token_ids=draft.prompt.told.get("teacher") or draft.prompt.token_ids,
            max_new_tokens=job.max_new_tokens,
            seed=key_of(job.seed, "teacher", draft.prompt.id, 0 if shared else draft.number),
            sampling=job.teacher_sampling,
            stop_ids=job.stop_ids,
            teacher=draft.prompt.teacher,
        )
        for draft in rest.values()
    ]
    completions = writer.generate(requests) if writer is not None and requests else []
    texts |= {name: Text(c.token_ids, c.finish) for name, c in zip(rest, completions, strict=True)}
    return [texts[draft.visit if shared else draft.id] for draft in drafts]


def _given(prompt: Prompt, job: RolloutJob) -> Text:
    """The data set's response as an engine would have written it: up to its first stop token, or to the limit."""
    ends = [t for t, token in enumerate(prompt.response_ids) if token in job.stop_ids]
    text = prompt.response_ids[: ends[0] + 1] if ends else prompt.response_ids
    fits = len(text) <= job.max_new_tokens
    return Text(text[: job.max_new_tokens], Finish.STOP if fits else Finish.LENGTH)
