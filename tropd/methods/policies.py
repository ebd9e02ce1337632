"""Who writes which token of a rollout.

A policy of your own is a frozen dataclass with the members of `RolloutPolicy` (docs/own_parts.md): `begin` says what
the teacher writes before the student goes on, `shares` how much that is on average.  Nothing else has to know it.

The examples show what each policy does on average.  Paste one after `from tropd.methods.policies import *`.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tropd.base.ranges import Ranged, Share, Whole
from tropd.errors import ConfigError
from tropd.methods.decoding import Decoding
from tropd.methods.drafts import Draft, RolloutJob, Writer, teacher_texts
from tropd.objective.context import World
from tropd.objective.memory import Memory
from tropd.objective.schedules import Schedule
from tropd.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Who writes how much, on average: `tropd plan` counts with it.  By default the student writes everything."""

    by_student: float = 1.0
    """Share of the rollouts that the student writes or goes on with."""
    prefix: float = 0.0
    """Tokens in such a rollout before the student begins."""
    texts: float = 0.0
    """Texts that the teacher has to write for the rollouts of one prompt."""


@dataclass(frozen=True, kw_only=True)
class Done:
    """What a policy sees of a step that was trained."""

    step: int
    progress: float
    """After the step."""
    rollouts: Sequence[Rollout]
    """Of this process."""
    probes: Mapping[str, float]
    """The step's numbers, the same on all ranks."""
    max_new_tokens: int
    """The run's, without a horizon."""
    world: World


class RolloutPolicy(Ranged):
    """What a method asks of the rollout stage: what the teacher writes of each rollout before the student goes on, how
    far the student writes, and whether the teacher has a say in each token."""

    @property
    def needs_teacher_text(self) -> bool:
        """Whether the policy needs texts that the teacher or the data set wrote."""
        return False

    @property
    def needs_grader(self) -> bool:
        """Whether the policy asks a grader, by `RolloutJob.grade`."""
        return False

    @property
    def description(self) -> str:
        """Who writes which token, for people.  By default the first paragraph of the class's docstring."""
        text, _, _ = (inspect.getdoc(type(self)) or type(self).__name__).partition("\n\n")
        return " ".join(text.split())

    def again(self, job: RolloutJob) -> Mapping[str, Sequence[Rollout]]:
        """Earlier rollouts that take the places of new ones: by the visit to a prompt, epoch / prompt, all of its
        rollouts.  Of the whole batch, and the same on all ranks."""
        return {}

    def check(self, num_rollouts: int) -> None:
        """Refuse, before anything is loaded, so many rollouts of a prompt if the policy could do nothing with them."""

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        """The job's drafts, each with what stands before the student's first token.  `writer` writes as the teacher;
        it is None where the teacher cannot write.  By default there is nothing."""
        return job.drafts()

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        """What `begin` does on average, at this progress, with so many rollouts of a prompt."""
        return Shares()

    def horizon(self, max_new_tokens: int, step: int, progress: float, memory: Memory) -> int:
        """How many tokens of a response are written in a step, of at most `max_new_tokens`."""
        return max_new_tokens

    def split(self, step: int, progress: float, memory: Memory) -> int | None:
        """Where a response is cut in two whose gradients are compared in this step: the probe "gradient/cosine" says
        whether the tokens before that position pull the student where all of them do.  None: nowhere."""
        return None

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        """How tokens are drawn where the teacher has a say in each; None: the student draws alone."""
        return None

    def remember(self, done: Done, memory: Memory) -> None:
        """After each step: what the policy keeps in `memory`, under `self.memory`/NAME; the same on all ranks."""

    @property
    def oldest(self) -> int:
        """How many steps old the rollouts of `again` may be."""
        return 0

    @property
    def memory(self) -> str:
        """What its tensors in memory are called."""
        return f"policy.{type(self).__name__}"

    @property
    def memories(self) -> tuple[str, ...]:
        """All names under which it and its parts remember."""
        return (self.memory,)

    @property
    def writes_jointly(self) -> bool:
        """Whether it may have a `decoding`, for which the teacher must be in this process."""
        return type(self).decoding is not RolloutPolicy.decoding


@dataclass(frozen=True, kw_only=True)
class OnPolicy(RolloutPolicy):
    """The student writes every token.

    >>> OnPolicy().shares(progress=0.0, num_rollouts=4, max_new_tokens=100)
    Shares(by_student=1.0, prefix=0.0, texts=0.0)
    """


@dataclass(frozen=True, kw_only=True)
class TeacherPrefix(RolloutPolicy):
    """The teacher writes the first tokens of a response, the student goes on from there (TrOPD).

    >>> fading = TeacherPrefix(length=Schedule(shape="linear", start=0.5, end=0.0))
    >>> [fading.shares(u, num_rollouts=4, max_new_tokens=100).prefix for u in (0.0, 0.5, 1.0)]  # in tokens
    [50.0, 25.0, 0.0]
    """

    length: Schedule = field(default_factory=lambda: Schedule(shape="cosine", start=1.0, end=0.0))
    """Longest prefix, as a share of the response budget, over training."""
    draw: Literal["longest", "uniform"] = "longest"
    """Each prefix as long as allowed, or uniformly between 0 and that."""
    share: Share = 1.0
    """Share of rollouts that get a prefix at all."""
    texts: Literal["shared", "own"] = "shared"
    """One teacher text for all rollouts of a prompt, or one for each."""
    keep: Whole = 1
    """When the teacher's text would fit whole, this many of its last tokens are left to the student."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.length.start, self.length.end
        if not 0.0 <= min(ends) <= max(ends) <= 1.0:
            raise ConfigError(
                f"the longest prefix goes from {ends[0]:g} to {ends[1]:g} of the response budget, but a share lies in "
                "[0, 1]."
            )

    @property
    def needs_teacher_text(self) -> bool:
        return True

    @property
    def description(self) -> str:
        length = "each is as long" if self.draw == "longest" else "each is of a length drawn uniformly up to that"
        texts = "one text for all rollouts of a prompt" if self.texts == "shared" else "one text for each rollout"
        return (
            f"{self.share:.0%} of the responses begin with a prefix that the teacher wrote, and the student goes on "
            f"from there. The longest prefix, as a share of the response budget: {self.length} over training; "
            f"{length}, {texts}."
        )

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        longest = int(self.length(job.progress) * job.max_new_tokens)
        drafts = job.drafts()
        chosen = [d for d in drafts if longest > 0 and job.draw("prefix?", d.id) < self.share]
        texts = teacher_texts(chosen, job, writer, shared=self.texts == "shared")
        begun = {}
        for draft, text in zip(chosen, texts, strict=True):
            length = longest
            if self.draw == "uniform":
                length = int(job.draw("prefix length", draft.id) * (longest + 1))
            begun[draft.id] = draft.begun(text, length, job.max_new_tokens, self.keep)
        return [begun.get(draft.id, draft) for draft in drafts]

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        longest = int(self.length(progress) * max_new_tokens)
        prefix = min(longest / 2 if self.draw == "uniform" else longest, max_new_tokens - 1)
        texts = 1 - (1 - self.share) ** num_rollouts if self.texts == "shared" else num_rollouts * self.share
        return Shares(prefix=prefix * self.share, texts=texts if longest > 0 else 0.0)


@dataclass(frozen=True, kw_only=True)
class TeacherText(RolloutPolicy):
    """The teacher, or the data set, writes every token.

    >>> TeacherText().shares(progress=0.0, num_rollouts=4, max_new_tokens=100)
    Shares(by_student=0.0, prefix=0.0, texts=4)
    """

    @property
    def needs_teacher_text(self) -> bool:
        return True

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        return _written(job.drafts(), job, writer)

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        return Shares(by_student=0.0, texts=num_rollouts)


@dataclass(frozen=True, kw_only=True)
class GivenText(RolloutPolicy):
    """The data set writes every token: the responses that it brings.

    >>> GivenText().shares(progress=0.0, num_rollouts=4, max_new_tokens=100)
    Shares(by_student=0.0, prefix=0.0, texts=0.0)
    """

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        if missing := sum(not prompt.response_ids for prompt, _ in job.prompts):
            raise ConfigError(
                f"this method trains on the data set's responses, but {missing} of {len(job.prompts)} prompts bring "
                "none. Set data.response_column to the column that has them."
            )
        return _written(job.drafts(), job, None)

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        return Shares(by_student=0.0)


@dataclass(frozen=True, kw_only=True)
class Mixture(RolloutPolicy):
    """Each batch (or rollout) is the student's with probability `student_share`, else the teacher's (GKD's lambda).

    >>> Mixture(student_share=0.75).shares(progress=0.0, num_rollouts=4, max_new_tokens=100)
    Shares(by_student=0.75, prefix=0.0, texts=1.0)
    """

    student_share: Share = 0.5
    coin: Literal["batch", "rollout"] = "batch"

    @property
    def needs_teacher_text(self) -> bool:
        return self.student_share < 1.0

    @property
    def description(self) -> str:
        return f"Each {self.coin} is the student's with probability {self.student_share:g}, else the teacher's."

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        drafts, batch = job.drafts(), job.batch_name
        theirs = [
            d for d in drafts if job.draw("mixture", batch if self.coin == "batch" else d.id) >= self.student_share
        ]
        written = {draft.id: draft for draft in _written(theirs, job, writer)}
        return [written.get(draft.id, draft) for draft in drafts]

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        return Shares(by_student=self.student_share, texts=num_rollouts * (1 - self.student_share))


def _written(drafts: Sequence[Draft], job: RolloutJob, writer: Writer | None) -> list[Draft]:
    texts = teacher_texts(drafts, job, writer)
    return [draft.written(text) for draft, text in zip(drafts, texts, strict=True)]
