"""TrOPD: the method that this library is named after."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tropd.base.ranges import Count, NotNegative, PositiveShare, Range, Share, Whole
from tropd.methods.base import Method, warn
from tropd.methods.policies import OnPolicy, RolloutPolicy, TeacherPrefix
from tropd.objective.losses import ForwardKL, NegativeLogLikelihood, PolicyGradient, StateReward
from tropd.objective.objective import Objective
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import STUDENT, TEACHER, Trust, TrustRegion
from tropd.objective.terms import Term, TokenLoss
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class TrOPD(Method):
    r"""Trust Region On-Policy Distillation.

    A token x that the student wrote is trusted with probability
    min(pi_T(x) / pi_S(x), 1).

        trusted   -sg[log pi_T(x) - log pi_S(x)] * log pi_S(x)
                  a reward: KL(student || teacher)
        outlier   sum_{v in top-k(pi_T)} pi_T(v) log(pi_T(v) / pi_S(v))
                  a loss: KL(teacher || student)
        guidance  -beta log pi_S(x)
                  on prefixes that the teacher wrote

    The longest prefix shrinks to nothing on a cosine, so training ends fully
    on-policy.  The expected share of outliers at a position is the total
    variation between the two models there.
    """

    name: Literal["tropd"] = "tropd"
    trust: Trust = "bernoulli"
    """Who is trusted: a draw with probability min(pi_T/pi_S, 1) (paper), a threshold on it, or it as a weight."""
    trust_threshold: PositiveShare = 1.0
    """Smallest agreement pi_T/pi_S that is trusted, with trust = "threshold" [inferred]. In (0, 1]."""
    outlier: Literal["forward_kl", "forward_kl_reward", "mask", "clip"] = "forward_kl"
    """What an outlier teaches: the teacher's top-k as a loss (paper's equations), the same number as a reward (what
    its Table 5 suggests; warns), nothing, or a floored reward."""
    top_k: Count = 64
    """Teacher support of the outlier loss (paper: 64). At least 1."""
    floor: Annotated[float, Range(at_most=0, unbounded=True)] = -2.558
    """Floor of the log-ratio with outlier = "clip"; the paper gives no value: log(.1)/.9, REOPOLD's [inferred]. At most
    0."""
    guidance: bool = True
    """Whether the teacher writes prefixes (paper)."""
    beta: NotNegative = 1e-3
    """Weight of the guidance loss (paper: 0.001). At least 0."""
    prefix: Schedule = field(default_factory=lambda: Schedule(shape="cosine", start=1.0, end=0.0))
    """Longest prefix, as a share of the response budget: all of it, then nothing, on a cosine (paper)."""
    prefix_draw: Literal["longest", "uniform"] = "longest"
    """Each prefix as long as allowed, or uniformly between 0 and that [inferred]."""
    prefix_share: Share = 1.0
    """Share of rollouts that get a prefix [inferred]. In [0, 1]."""
    prefix_texts: Literal["shared", "own"] = "shared"
    """One teacher text for all rollouts of a prompt, or one each [inferred]."""
    prefix_keep: Whole = 1
    """Tokens of a teacher text that fits whole which are left to the student [inferred]. At least 0."""
    denominator: Literal["actions", "student"] = "actions"
    """The mean is over all trained tokens, prefixes included, or over the student's own [inferred]."""

    paper = "2606.01249"
    summary = "log-ratio reward inside a trust region, teacher's top-k outside, teacher prefixes that fade"
    idea = "which tokens"
    readings = (
        "Membership is a Bernoulli draw (section 3.1 writes M ~ Bernoulli(P)); summaries that call every token with "
        "P < 1 an outlier describe trust = 'threshold', trust_threshold = 1, which is AOPD's gate.",
        "The forward KL is differentiated through the student. The paper never says; as a reward (outlier = "
        "'forward_kl_reward') it cannot raise the teacher's tokens, only push the student's down.",
        "No correction for the teacher's mass outside its top-k: none is mentioned.",
        "Rows 'TrOPD Mask' and 'TrOPD Clip' of Table 5 use a static threshold: trust = 'threshold', "
        "trust_threshold = exp(floor), outlier = 'mask' or 'clip'.",
        "The paper's steps have 128 prompts and answers of up to 8,096 tokens; a run's defaults, 16 and 512, suit a "
        "small GPU. The paper's are rollout.num_prompts = 128 and rollout.max_new_tokens = 8096.",
        "With the paper's beta and Adam, training begins with almost pure prefixes whose tiny gradients Adam rescales; "
        "at short budgets take beta = 1.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self._prefixes
        if self.outlier == "forward_kl_reward":
            warn(
                "outlier = 'forward_kl_reward' uses a divergence as a reward: on outliers it only pushes down what "
                "the student over-weights, and never raises the teacher's tokens. Use outlier = 'forward_kl'."
            )

    @property
    def objective(self) -> Objective:
        trusted = TrustRegion(self.trust, self.trust_threshold)
        terms = [
            Term("trusted", STUDENT & trusted, PolicyGradient(LogRatio()), over=self.denominator),
            Term("guidance", TEACHER, NegativeLogLikelihood(), weight=self.beta, over=self.denominator),
        ]
        if self.outlier != "mask":
            terms.insert(1, Term("outlier", STUDENT & ~trusted, self._outlier_loss, over=self.denominator))
        return Objective(*(terms if self.guidance else terms[:-1]))

    @property
    def _outlier_loss(self) -> TokenLoss:
        if self.outlier == "clip":
            return PolicyGradient(chain(LogRatio(), Clip(low=self.floor)))
        forward_kl = ForwardKL(support="teacher_top_k", top_k=self.top_k)
        return StateReward(forward_kl) if self.outlier == "forward_kl_reward" else forward_kl

    @property
    def rollout(self) -> RolloutPolicy:
        if not self.guidance:
            return OnPolicy()
        return self._prefixes

    @property
    def _prefixes(self) -> TeacherPrefix:
        return TeacherPrefix(
            length=self.prefix,
            draw=self.prefix_draw,
            share=self.prefix_share,
            texts=self.prefix_texts,
            keep=self.prefix_keep,
        )

    def objections(self, sampling: Sampling) -> list[str]:
        if not sampling.truncates and sampling.temperature == 1.0:
            return []
        return [
            "TrOPD's trust is a statement about tokens drawn from the student itself: with temperature "
            f"{sampling.temperature:g}, top_p {sampling.top_p:g}, top_k {sampling.top_k}, min_p {sampling.min_p:g} "
            "the share of outliers no longer equals the total variation and the reward is biased. "
            "Use temperature 1 and no truncation."
        ]
