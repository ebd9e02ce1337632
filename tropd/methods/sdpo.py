"""SDPO, and Multi-Rollout OPD, which grew out of it: the student's slow copy reads what became of its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, Finite, NotNegative, Share, Whole
from tropd.briefings.briefing import WithFeedback, WithPeers
from tropd.briefings.follow import Ema
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.losses import ImportanceWeighted, divergence_at
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term, TokenLoss

Wide = Literal["student_top_k", "teacher_top_k"]


def _on_few(beta: float, support: Wide, top_k: int, cap: float) -> TokenLoss:
    """The divergence on likely tokens and the rest as one more, weighted by a capped importance ratio."""
    loss = divergence_at(beta, support=support, top_k=top_k, outside="bucket")
    return ImportanceWeighted(loss, cap=cap) if cap else loss


@dataclass(frozen=True, kw_only=True)
class SDPO(Method):
    r"""Self-distillation policy optimisation: reverse KL on the student's top-k
    and a bucket for the rest, to a slow copy of the student that has read what
    the grader said of the very response.

        min(pi / mu, cap) KL(S || T) on top-k and rest,    mu drew the response
        S = pi(. | x, y_<t),    T = pi_ema(. | x, words on y, y_<t)
    """

    name: Literal["sdpo"] = "sdpo"
    told: Literal["feedback", "peers"] = "feedback"
    """What the teacher reads: the grader's words (paper: rich feedback), or a response of the group that succeeded
    (paper: where the grader gives numbers alone)."""
    beta: Share = 1.0
    """Between forward KL (0) and reverse KL (1) (code: 1 with feedback, 0.5 without). In [0, 1]."""
    support: Wide = "student_top_k"
    """Whose likeliest tokens (code: the student's); servers give the teacher's alone."""
    top_k: Count = 20
    """How many of them (code: 20 with feedback, 100 without). At least 1."""
    decay: Share = 0.99
    """How much of itself the teacher keeps at each step (code: 0.99 with feedback, 0.95 without). In [0, 1]."""
    ratio_cap: NotNegative = 2.0
    """Largest importance ratio (code: 2); 0 weighs all alike. At least 0."""
    threshold: Finite = 1.0
    """The least reward of a success, for told = 'peers' (code: 1). Any finite number."""

    paper = "2601.20802"
    summary = "reverse KL on top-k and rest to the student's average, told the grader's words"
    idea = "what teaches"
    readings = (
        "The defaults are those of the authors' runs with feedback. Their runs without: told = 'peers', beta = 0.5, "
        "top_k = 100, decay = 0.95.",
        "A response of which nothing can be told, because the grader said nothing or nobody else succeeded, teaches "
        "nothing. The authors tell words and a success together where both exist; here it is one of them.",
        "The trust-region teacher, a mixture of the start and the student, is left out: the paper prefers neither.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("divergence", STUDENT, _on_few(self.beta, self.support, self.top_k, self.ratio_cap)))

    @property
    def readers(self) -> Mapping[str, Reader]:
        peers = WithPeers(successes=1, failures=0, threshold=self.threshold)
        briefing = WithFeedback() if self.told == "feedback" else peers
        return {"teacher": Reader(model="start", briefing=briefing, follow=Ema(decay=self.decay))}


@dataclass(frozen=True, kw_only=True)
class MultiRollout(Method):
    r"""Multi-Rollout OPD: Jensen-Shannon on the student's top-k and a bucket for
    the rest, to a slow copy of the student that has read other responses to the
    prompt, those that succeeded and one that failed.

        min(pi / mu, cap) [beta KL(T || M) + (1 - beta) KL(S || M)]
        S = pi(. | x, y_<t),    T = pi_ema(. | x, peers of y, y_<t)
    """

    name: Literal["multi_rollout"] = "multi_rollout"
    successes: Whole = 2
    """Responses told that succeeded, never the one that is read (paper: 2). At least 0."""
    failures: Whole = 1
    """Responses told that failed, as attempts to avoid (paper: 1). At least 0."""
    threshold: Finite = 1.0
    """The least reward of a success (code: 1). Any finite number."""
    beta: Share = 0.5
    """Between forward KL (0) and reverse KL (1) (paper: 0.5; 1 on mathematics). In [0, 1]."""
    support: Wide = "student_top_k"
    """Whose likeliest tokens (code: the student's); servers give the teacher's alone."""
    top_k: Count = 100
    """How many of them (code: 100). At least 1."""
    decay: Share = 0.95
    """How much of itself the teacher keeps at each step (code: 0.95). In [0, 1]."""
    ratio_cap: NotNegative = 2.0
    """Largest importance ratio (code: 2); 0 weighs all alike. At least 0."""

    paper = "2605.12652"
    summary = "Jensen-Shannon on top-k and rest to the student's average, told its other responses"
    idea = "what teaches"
    readings = (
        "Where a response has fewer peers of a kind than asked, those that there are are told; one without any peer "
        "that says something else teaches nothing.",
        "It needs rollout.num_rollouts above 1 (code: 8) and a grader.",
        "The code can also tell summaries of responses, which a model writes: left out, as in the paper's best runs.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("divergence", STUDENT, _on_few(self.beta, self.support, self.top_k, self.ratio_cap)))

    @property
    def readers(self) -> Mapping[str, Reader]:
        peers = WithPeers(successes=self.successes, failures=self.failures, threshold=self.threshold)
        return {"teacher": Reader(model="start", briefing=peers, follow=Ema(decay=self.decay))}
