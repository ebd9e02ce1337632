"""PTD-PO, its text part: GRPO, and a tutor with a hint where the student failed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, Finite, NotNegative, Positive, Share
from tropd.briefings.briefing import WithColumn
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient, divergence_at
from tropd.objective.objective import Objective
from tropd.objective.places import ShorterThan
from tropd.objective.rewards import GroupAdvantage
from tropd.objective.selectors import STUDENT, Verified
from tropd.objective.terms import Term

HINT = (
    "{prompt}\n\nHere is a hint on how to go about it:\n\n{value}\n\n"
    "Solve the problem step by step with its help, without speaking of the hint."
)


@dataclass(frozen=True, kw_only=True)
class PTD(Method):
    r"""Privileged tutoring: GRPO on all responses, and on those that failed
    Jensen-Shannon to the student before training, told a hint h that gives
    nothing away.

        GRPO + weight * mean over tokens of failures of
        beta KL(T || M) + (1 - beta) KL(S || M) on both top-k and a bucket
        T = pi_start(. | x, h, y_<t),    S = pi(. | x, y_<t)
    """

    name: Literal["ptd"] = "ptd"
    column: str = "hint"
    """The data set's column with the hint (paper: written beforehand by a large model)."""
    weight: NotNegative = 0.05
    """Of the divergence (paper: 0.05 for 2B and 8B; code: 0.5 for 4B). At least 0."""
    beta: Share = 0.5
    """Between forward KL (0) and reverse KL (1) (paper: Jensen-Shannon). In [0, 1]."""
    top_k: Count = 100
    """Of the teacher's and of the student's likeliest tokens (paper: 100 of each). At least 1."""
    ratio_clip: Positive = 0.2
    """GRPO's clip [inferred]; it acts from the second update of a batch on. Above 0."""
    success: Finite = 0.0
    """A response failed if its reward is at most this [inferred]. Any finite number."""
    shorter_than: Count | None = None
    """Only failures of fewer tokens are tutored: rollout.max_new_tokens leaves out those that were cut. (paper: valid
    ones; what is valid is inferred, none takes all.) At least 1."""

    paper = "2606.07000"
    summary = "GRPO, and Jensen-Shannon to the student before training, told a hint, on failures"
    idea = "what teaches"
    zero_at_teacher = False
    readings = (
        "The paper's hints speak of images too; this is the part with text.",
        "Outside of both top-k all tokens are one bucket (paper). The released code sums over the student's alone and "
        "shares the rest out evenly; and it detaches its weight, so that its divergence has no gradient at all: that "
        "is not offered.",
        "No reference KL: failures skip it in the code, and its weight for the others is not known.",
    )

    @property
    def objective(self) -> Objective:
        failed = STUDENT & ~Verified(above=self.success)
        where = failed if self.shorter_than is None else failed & ShorterThan(self.shorter_than)
        tutor = divergence_at(self.beta, support="union", top_k=self.top_k, outside="bucket")
        grpo = PolicyGradient(GroupAdvantage(divide=True), clip=self.ratio_clip)
        return Objective(
            Term("grpo", STUDENT, grpo, over="sequences"),
            Term("tutor", where, tutor, weight=self.weight, over="members"),
        )

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": Reader(model="start", briefing=WithColumn(column=self.column, template=HINT))}
