"""OGLS-SD: the student before training, steered from what failed to what succeeded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, Finite, NotNegative, Positive, PositiveShare
from tropd.briefings.briefing import WithPeers
from tropd.briefings.mixtures import Steered
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.losses import ForwardKL, NegativeLogLikelihood, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.places import LastPositions, PositionBelow, Shortest
from tropd.objective.selectors import STUDENT, Verified
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class OGLS(Method):
    r"""Forward KL to logits that are steered by outcomes, on the first tokens of
    what failed, and likelihood of the ends of short successes.

        T = softmax(log b + strength (log right - log wrong))
        KL(T || S) on failures, each entry of the vocabulary at most so much
        b = pi_start(. | x),    right, wrong = pi_start(. | x, peers that
        succeeded or failed),    S = pi(. | x, y_<t)
    """

    name: Literal["ogls"] = "ogls"
    strength: Finite = 1.0
    """How far the logits are steered (paper: lambda, without a value) [inferred]. Any finite number."""
    peers: Count = 1
    """Other responses that each side is told [inferred]. At least 1."""
    threshold: Finite = 1.0
    """The least reward of a success [inferred]. Any finite number."""
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl"
    """Which divergence (paper: forward KL; another account of the paper says reverse)."""
    entry_clip: Positive = 0.05
    """The most that one entry of the vocabulary adds, in nats (paper: clipped; OPSD's value is inferred). Above 0."""
    first: Count = 1024
    """Tokens of a failure that learn from the steered reader (paper: 1024). At least 1."""
    anchor: NotNegative = 0.1
    """Weight of the likelihood of successes [inferred]. At least 0."""
    last: Count = 128
    """Tokens of a success that it counts (paper: 128). At least 1."""
    short: PositiveShare = 0.5
    """The shortest share of a prompt's successes are anchors (paper: short ones) [inferred]. In (0, 1]."""

    paper = "2605.12400"
    summary = "forward KL to logits steered by outcomes on failures, likelihood of the ends of short successes"
    idea = "what teaches"
    zero_at_teacher = False
    readings = (
        "The paper takes the mean of readers that are told one response each; here one reader is told them together. "
        "With peers = 1, the default, there is one on each side.",
        "A failure is told of other failures, never of itself. Where nobody else succeeded or failed, the response "
        "teaches nothing.",
        "It needs rollout.num_rollouts above 1 (paper: 8) and a grader.",
    )

    @property
    def objective(self) -> Objective:
        right = Verified(above=self.threshold - 1e-6)
        kind = ForwardKL if self.divergence == "forward_kl" else ReverseKL
        steered = kind(entry_clip=self.entry_clip, reader="steered")
        terms = [Term("steered", STUDENT & ~right & PositionBelow(self.first), steered)]
        if self.anchor:
            short = Shortest(self.short, among=STUDENT & right)
            anchor = NegativeLogLikelihood()
            terms.append(Term("anchor", short & LastPositions(self.last), anchor, weight=self.anchor, over="members"))
        return Objective(*terms)

    @property
    def readers(self) -> Mapping[str, Reader]:
        right = WithPeers(successes=self.peers, failures=0, threshold=self.threshold)
        wrong = WithPeers(successes=0, failures=self.peers, threshold=self.threshold)
        steered = Steered(base="teacher", plus=("right",), minus=("wrong",), strength=self.strength)
        return {
            "teacher": Reader(model="start"),
            "right": Reader(briefing=right),
            "wrong": Reader(briefing=wrong),
            "steered": Reader(steered=steered),
        }
