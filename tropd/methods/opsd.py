"""OPSD: the student teaches itself, with a solution in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tropd.base.ranges import Positive, PositiveShare, Share, Whole
from tropd.briefings.briefing import WithColumn
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.losses import divergence_at
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class OPSD(Method):
    r"""Full-vocabulary Jensen-Shannon between the student, and the same model
    with a solution s in its prompt x, on what the student writes.

        beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S
        T = pi_start(. | x, s, y_<t),    S = pi(. | x, y_<t)
    """

    name: Literal["opsd"] = "opsd"
    column: str = "solution"
    """The data set's column with the solution that the teacher is told (paper: a reference solution)."""
    beta: Share = 0.5
    """Between forward KL (0) and reverse KL (1), which the ends are by convention [inferred]. In [0, 1]."""
    temperature: Positive = 1.1
    """Of the rollouts (code: 1.1); the loss is at temperature 1. Above 0."""
    top_p: PositiveShare = 0.95
    """Of the rollouts (code: 0.95). In (0, 1]."""
    top_k: Whole = 20
    """Of the rollouts; 0 keeps every token (code: 20). At least 0."""
    entry_clip: Positive | None = None
    """The most that one entry of the vocabulary adds to the divergence, in nats; an entry above it has no gradient, so
    that words of style do not drown the others. The code's jsd_token_clip, 0.05 in its scripts and 1e-6 in a follow-up;
    left out, nothing is clamped (paper). Above 0."""
    teacher_top_k: Whole = 0
    """Sum over this many of the teacher's likeliest tokens, both sides renormalised there; 0 sums over all (the code
    offers 50). At least 0."""

    paper = "2601.18734"
    summary = "Jensen-Shannon over the whole vocabulary with the student itself, told the solution"
    idea = "what teaches"
    readings = (
        "The teacher is the student before training, which the authors recommend. They also have an average of the "
        'student and the student as it is: [teacher] with path = "start" and follow = { rule = "ema", decay = 0.999 }, '
        'or path = "student", and in both cases briefing = { kind = "column", column = "solution" }, because a section '
        "[teacher] stands in for all that the method prescribes. Told nothing, the student teaches itself nothing.",
        "The paper clamps nothing and the released code does: entry_clip = 0.05 is the code's.",
        "The authors also offer the sampled token's log-ratio as a reward: that is 'opd' with the same teacher.",
    )

    @property
    def objective(self) -> Objective:
        over: dict[str, Any] = {"entry_clip": self.entry_clip}
        if self.teacher_top_k:
            over |= {"support": "teacher_top_k", "top_k": self.teacher_top_k, "outside": "renormalise"}
        return Objective(Term("divergence", STUDENT, divergence_at(self.beta, **over)))

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"teacher": Reader(model="start", briefing=WithColumn(column=self.column))}
