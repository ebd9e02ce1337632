"""UniSD: self-distillation from five parts, each with a switch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, NotNegative, Positive, Share, Whole
from tropd.briefings.briefing import WithColumn, WithDemonstrations
from tropd.briefings.follow import Ema, Frozen
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.agreement import Agreement, ContrastiveHinge, Spread
from tropd.objective.hidden import HiddenMatch
from tropd.objective.losses import AtMost, divergence_at
from tropd.objective.objective import Objective
from tropd.objective.places import PositionBelow
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class UniSD(Method):
    r"""A divergence over the whole vocabulary to the student's slow copy, told a
    solution, and more parts, each with a switch: contexts = 0, decay = 1,
    contrast = 0, features = 0, no clip.

        sum_t w_t D_alpha(T, S) / sum_t w_t    forward KL(T || S) at alpha 0
        agreement  w = 1 / (1 + gamma min(d / Q95(d), 10)), d the variance of
                   log pi_T of a written token over readers told examples
        ema        every `sync` steps T <- decay T + (1 - decay) S, of weights
        contrast   + weight max(0, margin + |s - good| - |s - bad|) of s, good
                   and bad, log pi of the written token; bad is told a wrong one
        features   + weight 1/H |h_S - h_T|^2, the last hidden states
        clip       D at most so many nats
    """

    name: Literal["unisd"] = "unisd"
    column: str = "solution"
    """The data set's column with solutions (paper: a reference solution)."""
    alpha: Share = 0.0
    """Between forward KL (0) and reverse KL (1) (code: 0). In [0, 1]."""
    contexts: Whole = 3
    """Readers whose agreement weighs tokens (paper's UniSD*: 3), 2 or more; 0 weighs all alike. At least 0."""
    examples: Count = 3
    """Solved problems that each of them is told (paper's UniSD*: 3). At least 1."""
    pick: Literal["nearest", "random"] = "nearest"
    """Which ones (paper's UniSD*: retrieval; the code retrieves by embeddings, this by words)."""
    gamma: NotNegative = 0.001
    """How strongly disagreement weighs (paper's UniSD*: 0.001). At least 0."""
    agreement_per: Literal["token", "sequence"] = "token"
    """What is weighed (code: both are offered) [inferred]."""
    spread: Spread = "variance"
    """How disagreement is measured (code: variance)."""
    decay: Share = 0.98
    """How much of itself the teacher keeps (paper's UniSD*: 0.98; code's EMA alone: 0.9); 1 leaves it the student
    before training. In [0, 1]."""
    sync: Count = 10
    """Steps from one move of the teacher to the next (paper's UniSD*: 10). At least 1."""
    contrast: NotNegative = 0.01
    """Weight of the contrastive hinge (paper's UniSD*: 0.01); 0 leaves it out. At least 0."""
    margin: NotNegative = 0.1
    """Of the hinge, in nats (paper's UniSD*: 0.1). At least 0."""
    wrong_column: str | None = None
    """The column with a wrong solution to tell the bad reader (code: one that the model wrote); none tells it other
    problems' solutions as wrong ones."""
    features: NotNegative = 0.01
    """Weight of the difference of the last hidden states (paper's UniSD*: 0.01); 0 leaves it out. At least 0."""
    clip: Positive | None = None
    """The most that a token's divergence counts, in nats (code: 10 in its clip mode, none in UniSD*). Above 0."""
    skip: Whole = 0
    """First tokens of each response that teach nothing (the code offers it: 0). At least 0."""
    temperature: Positive = 0.7
    """Of the rollouts (code: 0.7); the loss is at temperature 1. Above 0."""

    paper = "2605.06597"
    summary = "divergence to the student's average, told a solution; agreement, contrast, features, clip"
    idea = "what teaches"
    zero_at_teacher = False
    readings = (
        "The defaults are UniSD*, as the paper reports it. The released code's defaults are other ones: gamma = 1, "
        "contrast = 0.1, margin = 0.5, features = 0.1, decay = 0.9, temperature = 0.7.",
        "One part alone is the others switched off: contexts = 0, decay = 1, contrast = 0, features = 0. With all of "
        "them off it is forward KL to the student before training, told the solution.",
        "The clip at a quantile of the batch has the gradient of leaving the tokens above it out (docs/algebra.md).",
        "Induced instructions as contexts, which a model writes beforehand, are a column of the data set: a section "
        "[readers.context_0] with that column.",
    )

    @property
    def objective(self) -> Objective:
        where = STUDENT & ~PositionBelow(self.skip) if self.skip else STUDENT
        loss = divergence_at(self.alpha)
        loss = loss if self.clip is None else AtMost(loss, nats=self.clip)
        if self.contexts:
            weight = Agreement(self._contexts, self.gamma, self.spread, per=self.agreement_per)
            terms = [Term("divergence", where & weight, loss, over="members")]
        else:
            terms = [Term("divergence", where, loss)]
        if self.contrast:
            terms.append(Term("contrast", where, ContrastiveHinge(margin=self.margin), weight=self.contrast))
        if self.features:
            terms.append(Term("features", where, HiddenMatch(), weight=self.features))
        return Objective(*terms)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature)

    @property
    def _contexts(self) -> tuple[str, ...]:
        return tuple(f"context_{number}" for number in range(self.contexts))

    @property
    def readers(self) -> Mapping[str, Reader]:
        follow = Frozen() if self.decay == 1 else Ema(decay=self.decay, every=self.sync)
        readers = {"teacher": Reader(model="start", briefing=WithColumn(column=self.column), follow=follow)}
        for draw, name in enumerate(self._contexts):
            readers[name] = Reader(briefing=self._examples(draw=draw))
        if self.contrast:
            wrong = self.wrong_column
            bad = self._examples(good=False) if wrong is None else WithColumn(column=wrong)
            readers["bad"] = Reader(briefing=bad)
        return readers

    def _examples(self, draw: int = 0, good: bool = True) -> WithDemonstrations:
        return WithDemonstrations(solution=self.column, count=self.examples, pick=self.pick, draw=draw, good=good)
