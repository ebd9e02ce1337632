"""GKD and MiniLLM: the classical baselines with a signal on each token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import NotNegative, Positive, Share
from tropd.methods.base import Method, warn
from tropd.methods.policies import Mixture, OnPolicy, RolloutPolicy
from tropd.objective.losses import NegativeLogLikelihood, PolicyGradient, ReverseKL, divergence_at
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, FutureSum, LogRatio, Standardise, chain
from tropd.objective.selectors import STUDENT, TEACHER
from tropd.objective.terms import Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class GKD(Method):
    r"""Generalised knowledge distillation: full-vocabulary Jensen-Shannon on a
    mix of texts.

        beta KL(T || M) + (1 - beta) KL(S || M),    M = beta T + (1 - beta) S
    """

    name: Literal["gkd"] = "gkd"
    beta: Share = 0.5
    """Between forward KL (0) and reverse KL (1); the ends are special cases, not limits (TRL: 0.5). In [0, 1]."""
    student_share: Share = 0.5
    """Share of batches that the student writes, the teacher the others (paper's lambda; TRL: 0.5). In [0, 1]."""
    temperature: NotNegative = 0.9
    """Of the rollouts (TRL: 0.9); the loss is at temperature 1. At least 0."""

    paper = "2306.13649"
    summary = "Jensen-Shannon over the whole vocabulary, on texts of student and teacher"
    idea = "who writes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta in (0.0, 1.0):
            end = "forward" if self.beta == 0 else "reverse"
            warn(
                f"GKD with beta = {self.beta:g} is {end} KL by convention, not by continuity: Jensen-Shannon vanishes "
                "at both ends, so a beta of 0.001 or 0.999 is about 1000 times weaker."
            )

    @property
    def objective(self) -> Objective:
        return Objective(Term("divergence", STUDENT | TEACHER, divergence_at(self.beta)))

    @property
    def rollout(self) -> RolloutPolicy:
        return Mixture(student_share=self.student_share)

    @property
    def sampling(self) -> Sampling:
        return Sampling(temperature=self.temperature)


@dataclass(frozen=True, kw_only=True)
class MiniLLM(Method):
    r"""MiniLLM: sequence-level reverse KL, split into the token's own part
    (exact) and the rest (policy gradient).

        long    PPO-clipped, standardised over the batch:
                a_t = mean_{i > t} discount^(i - t) (log pi_T - log pi_S)_i
        single  KL(student || teacher) over the whole vocabulary
        text    -log pi_S on the data set's responses, if text_share is above 0
    """

    name: Literal["minillm"] = "minillm"
    discount: Share = 1.0
    """How much later tokens count (paper: 1). In [0, 1]."""
    length_normalised: bool = True
    """Divide the future by the number of tokens left (paper)."""
    standardised: bool = True
    """Zero mean and unit deviation over the batch (code)."""
    single_step: bool = True
    """Whether the token's own part is exact; otherwise it is part of the reward."""
    own_reward: Literal["once", "twice"] = "once"
    """How often the token's own part counts with single_step: once, exactly (paper's decomposition), or in the reward
    as well (the authors' code)."""
    ratio_clip: Positive | None = 0.2
    """PPO clip (code: 0.2).  It acts from the second update of a batch on: see optimizer.num_updates. Above 0."""
    reward_clip: Positive | None = None
    """The most that a token's log-ratio counts before the sum, in nats, up or down (code: a knob; none [inferred]).
    Above 0."""
    text_share: Share = 0.0
    """Share of the rollouts that are the data set's responses, or the teacher's where it has none, for a
    language-model loss (paper: a corpus beside the prompts; 0 leaves it out [inferred]). In [0, 1]."""
    text_weight: NotNegative = 1.0
    """Of that loss (paper: 1). At least 0."""

    paper = "2306.08543"
    summary = "reverse KL of whole sequences: return-to-go reward plus an exact single step"
    idea = "whose distribution"
    readings = (
        "Tokens drawn from a mixture of both models are weighed by pi_S / mixture, token by token as in the code: a "
        "rollout says with which probability each token was drawn. The mixture is a policy (rollout.policy).",
        "The language-model loss of the paper is on a pre-training corpus; here it is on responses of the data set.",
        "With single_step the reward excludes the token itself, as in the paper's decomposition. The authors' code "
        "sums rewards from the token itself on and adds the exact single step, so the token's own part counts twice "
        "there, as in TRL at discount 0: own_reward = 'twice'.",
    )

    @property
    def objective(self) -> Objective:
        current = not self.single_step or self.own_reward == "twice"
        future = FutureSum(self.discount, current=current, mean=self.length_normalised)
        limit = [] if self.reward_clip is None else [Clip(-self.reward_clip, self.reward_clip)]
        links = [LogRatio(), *limit, future, *([Standardise()] if self.standardised else [])]
        over = "student" if self.text_share else "actions"
        terms = [Term("long", STUDENT, PolicyGradient(chain(*links), clip=self.ratio_clip), over=over)]
        if self.single_step:
            terms.append(Term("single", STUDENT, ReverseKL(), over=over))
        if self.text_share:
            terms.append(Term("text", TEACHER, NegativeLogLikelihood(), weight=self.text_weight, over="teacher"))
        return Objective(*terms)

    @property
    def rollout(self) -> RolloutPolicy:
        return Mixture(student_share=1.0 - self.text_share, coin="rollout") if self.text_share else OnPolicy()
