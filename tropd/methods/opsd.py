"""OPSD: the student teaches itself, with a solution in front of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from tropd.base.ranges import Positive, PositiveShare, Share, Whole
from tropd.methods.base import Method
from tropd.objective.losses import ForwardKL, JensenShannon, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term, TokenLoss
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class OPSD(Method):
    r"""Full-vocabulary Jensen-Shannon between the student, and the same model
    with a solution s in its prompt x, on what the student writes.

        beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S
        T = pi_start(. | x, s, y_<t),    S = pi(. | x, y_<t)
    """

    name: Literal["opsd"] = "opsd"
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
    readings = (
        'The teacher is a setting of the run: teacher.path = "start", the student before training, which the authors '
        'recommend, or "student", with briefing = { kind = "column", column = "solution" }. Told nothing, it teaches '
        "nothing.",
        "The paper clamps nothing and the released code does: entry_clip = 0.05 is the code's.",
        "The authors also offer the sampled token's log-ratio as a reward: that is 'opd' with the same teacher.",
    )

    @property
    def objective(self) -> Objective:
        over: dict[str, Any] = {"entry_clip": self.entry_clip}
        if self.teacher_top_k:
            over |= {"support": "teacher_top_k", "top_k": self.teacher_top_k, "outside": "renormalise"}
        ends: dict[float, TokenLoss] = {0.0: ForwardKL(**over), 1.0: ReverseKL(**over)}
        return Objective(Term("divergence", STUDENT, ends.get(self.beta) or JensenShannon(beta=self.beta, **over)))

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature, top_p=self.top_p, top_k=self.top_k)
