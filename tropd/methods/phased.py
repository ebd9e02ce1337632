"""Texts of the teacher, or of the data set, among the rollouts of the first steps (SG-OPD: phased teacher sampling)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tropd.base.ranges import Finite
from tropd.errors import ConfigError
from tropd.methods.drafts import Draft, RolloutJob, Text, Writer, teacher_texts
from tropd.methods.policies import RolloutPolicy, Shares
from tropd.objective.schedules import Schedule
from tropd.types import Finish


@dataclass(frozen=True, kw_only=True)
class Phased(RolloutPolicy):
    """A share of the rollouts of each prompt, which fades, is written by the teacher or the data set, where the grader
    finds that right (SG-OPD); all others are the student's.

    >>> fading = Phased(share=Schedule(shape="linear", start=0.5, end=0.0, until=0.5), verified=False)
    >>> [fading.shares(u, num_rollouts=4, max_new_tokens=100).by_student for u in (0.0, 0.25, 0.5)]
    [0.5, 0.75, 1.0]
    """

    share: Schedule = field(default_factory=lambda: Schedule(shape="linear", start=0.5, end=0.0, until=0.3))
    """[inferred] The share of the rollouts of each prompt that the teacher may write, over training."""
    verified: bool = True
    """Whether a text has to pass the grader (paper); the rollout of one that fails stays the student's."""
    passes: Finite = 1.0
    """The least reward of a text that passes: 1 is right for every grader of tropd [inferred]. Any finite number."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = (self.share.start,) if self.share.shape == "constant" else (self.share.start, self.share.end)
        if not 0.0 <= min(ends) <= max(ends) <= 1.0:
            raise ConfigError(
                f"the share of the rollouts that the teacher writes is {self.share}, but a share lies in [0, 1]."
            )

    @property
    def needs_teacher_text(self) -> bool:
        return True

    @property
    def needs_grader(self) -> bool:
        return self.verified

    @property
    def description(self) -> str:
        passed = f" if the grader gives it {self.passes:g} or more" if self.verified else ""
        return (
            f"A share of the rollouts of each prompt is a text of the teacher or of the data set{passed}: {self.share} "
            "over training. The student writes all others."
        )

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        drafts, share = job.drafts(), self.share(job.progress)
        number = {d.visit: int(share * job.num_rollouts + job.draw("phased", d.visit)) for d in drafts}
        chosen = [draft for draft in drafts if draft.number < number[draft.visit]]  # the same ones: texts are kept
        whole = replace(job, max_new_tokens=job.budget or job.max_new_tokens) if self.verified else job
        texts = dict(zip([d.id for d in chosen], teacher_texts(chosen, whole, writer), strict=True))
        passed = self._passed([draft.written(texts[draft.id]) for draft in chosen], job)
        return [d.written(_cut(texts[d.id], job)) if d.id in passed else d for d in drafts]

    def shares(self, progress: float, num_rollouts: int, max_new_tokens: int) -> Shares:
        """As if every text passed."""
        share = self.share(progress)
        return Shares(by_student=1 - share, texts=num_rollouts * share)

    def _passed(self, written: list[Draft], job: RolloutJob) -> set[str]:
        if not self.verified:
            return {draft.id for draft in written}
        assert job.grade is not None, "a run whose policy needs a grader has one"
        graded = job.grade([draft.rollout() for draft in written]) if written else []
        return {rollout.id for rollout in graded if (rollout.reward or 0.0) >= self.passes}


def _cut(text: Text, job: RolloutJob) -> Text:
    """Up to the horizon."""
    long = len(text.token_ids) > job.max_new_tokens
    return Text(text.token_ids[: job.max_new_tokens], Finish.LENGTH) if long else text
