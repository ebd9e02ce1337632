"""SG-OPD and OPDVR: the grader's verdict gates what the teacher says of each token, softly or hard."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from tropd.base.ranges import Finite, NotNegative
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.methods.extras import Judge
from tropd.methods.phased import Phased
from tropd.methods.policies import RolloutPolicy
from tropd.objective.losses import NegativeLogLikelihood, PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT, TEACHER
from tropd.objective.terms import Reward, Term
from tropd.objective.verdicts import SignExtrapolation, SignGate


@dataclass(frozen=True, kw_only=True)
class SGOPD(Method):
    r"""Sign-gated OPD: where teacher and grader agree on a token, its reward
    goes beyond the teacher.

        r_t    = log pi_T(x_t) - log pi_S(x_t)
        reward   r_t + (lambda_t - 1) (log pi_T(x_t) - log pi_start(x_t))
        lambda_t = agree      sign r_t = +1 in a response that succeeded,
                              -1 in one that failed
                   conflict   otherwise
        guidance -beta log pi_S(x) on texts of the teacher that the grader
                 passed: the first steps have some among the rollouts

    agree = conflict = 1, beta = 0 on the student's rollouts alone is OPD.
    """

    name: Literal["sg_opd"] = "sg_opd"
    agree: Finite = 1.8
    """lambda where both agree (reproduction: 1.8, "best in the original"). Any finite number."""
    conflict: Finite = 1.0
    """lambda where they do not (reproduction: 1); below 1 holds the student nearer to its start. Any finite number."""
    success: Finite = 0.0
    """A response succeeded if its reward is above this [inferred]. Any finite number."""
    phase: Phased = field(default_factory=Phased)
    """How many rollouts the teacher may write, over training [inferred: half of them at first, none after 30 %]."""
    beta: NotNegative = 1.0
    """Weight of the likelihood of the teacher's texts; at 0 they teach nothing [inferred]. At least 0."""

    paper = "2606.09304"
    idea = "which tokens"
    summary = "OPD whose reward goes beyond the teacher where teacher and grader agree on a token"
    readings = (
        "The paper's equation was not found. Two accounts of it agree on lambda = 1.8 and 1 in the form of ExOPD, "
        'which makes its word "extrapolate" literal; another reading would multiply the reward by lambda.',
        'The reader "start" is the student before training [inferred].',
        "At cold start a decaying share of each group is texts of the teacher that the verifier accepted. How they "
        "are trained is not said: here by their likelihood, as TrOPD's prefixes.",
    )

    @property
    def objective(self) -> Objective:
        gate = SignExtrapolation(self.agree, self.conflict, above=self.success)
        reward = Term("reverse_kl", STUDENT, PolicyGradient(chain(LogRatio(), gate)))
        guidance = Term("guidance", TEACHER, NegativeLogLikelihood(), weight=self.beta)
        return Objective(reward, guidance) if self.beta > 0 else Objective(reward)

    @property
    def rollout(self) -> RolloutPolicy:
        return self.phase

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"start": Reader(model="start")}


@dataclass(frozen=True, kw_only=True)
class SignExtrapolated(Judge):
    """SG-OPD's gate on the rewards of any method.  It needs a section [readers.start] with path = "start"."""

    name: Literal["sg_opd"] = "sg_opd"
    agree: Finite = 1.8
    """lambda where reward and grader agree. Any finite number."""
    conflict: Finite = 1.0
    """lambda where they do not. Any finite number."""
    success: Finite = 0.0
    """A response succeeded if its reward is above this. Any finite number."""

    idea = "which tokens"
    summary = "SG-OPD's gate: rewards go beyond the teacher where the grader agrees"

    @property
    def link(self) -> Reward:
        return SignExtrapolation(self.agree, self.conflict, above=self.success)


@dataclass(frozen=True, kw_only=True)
class OPDVR(Method):
    r"""OPD with verified rewards: a token whose reward contradicts the grader
    teaches nothing.

        reward  r_t = log pi_T(x_t) - log pi_S(x_t)
                max(r_t, 0) in a response that succeeded,
                min(r_t, 0) in one that failed
    """

    name: Literal["opdvr"] = "opdvr"
    success: Finite = 0.0
    """A response succeeded if its reward is above this [inferred]. Any finite number."""

    paper = "2608.24696"
    idea = "which tokens"
    summary = "OPD without the tokens on which teacher and grader disagree"
    readings = ("The mean is over all tokens, gated ones included [inferred]. The paper gates 40 to 51 % of them.",)

    @property
    def objective(self) -> Objective:
        gated = chain(LogRatio(), SignGate(above=self.success))
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(gated)))


@dataclass(frozen=True, kw_only=True)
class SignGated(Judge):
    """OPDVR's gate on the rewards of any method: 0 where their sign contradicts the grader."""

    name: Literal["opdvr"] = "opdvr"
    success: Finite = 0.0
    """A response succeeded if its reward is above this. Any finite number."""

    idea = "which tokens"
    summary = "OPDVR's gate: no reward where it contradicts the grader"

    @property
    def link(self) -> Reward:
        return SignGate(above=self.success)
