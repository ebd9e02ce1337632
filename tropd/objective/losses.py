"""What to minimise at a token, in nats.  Each loss is named by the gradient that it produces.

Two kinds:
  PolicyGradient   weighs log pi_S of the written token by a reward: -a * grad log pi_S(x)
  divergences      sum over a support and are differentiated through the student's probabilities

`StateReward` is the only way from the second kind to the first, and says what goes wrong.  Paste an example after
`from tropd.objective.examples import *`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from tropd.base.ranges import Count, Positive, Range
from tropd.errors import ConfigError, EvidenceError
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.rewards import LogRatio
from tropd.objective.support import Outside, Support, add_bucket, expected_gap, log_mixture, on_support
from tropd.objective.targets import Target
from tropd.objective.terms import Reward, TokenLoss, check_piece


@dataclass(frozen=True)
class PolicyGradient(TokenLoss):
    """-a * rho with rho = pi_S(x) / mu(x), mu the policy that sampled x; rho = 1 on the first step after a rollout.

    Gradient: -a rho grad log pi_S(x).  With x ~ pi_S its expectation is that of the divergence the reward names.
    `clip`  PPO: no gain from moving rho beyond 1 +- clip.   `cap`  truncated importance weight min(rho, cap).

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -2.0], teacher_logprobs_N=[-0.5, -4.0])
    >>> logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> PolicyGradient()(tokens, StudentView(logprobs_N=logprobs_N), tokens.log_ratio_N).sum().backward()
    >>> logprobs_N.grad  # minus the reward: a step makes the first token likelier, the second less likely
    tensor([-0.5000,  2.0000])
    """

    reward: Reward = field(default_factory=LogRatio)
    clip: Positive | None = None
    cap: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.reward, Reward, "the reward of a policy gradient")
        if self.clip is not None and self.cap is not None:
            raise ConfigError("a policy gradient takes a PPO `clip` or an importance `cap`, not both.")

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        if reward_N is None:
            raise EvidenceError("a policy gradient was asked for without the rewards of its plan.")
        rho_N = (student.logprobs_N - tokens.behavior_logprobs_N).exp()
        if self.cap is not None:
            step_N = (student.logprobs_N - student.logprobs_N.detach()).exp()
            return -reward_N * rho_N.detach().clamp(max=self.cap) * step_N
        if self.clip is not None:
            clipped_N = rho_N.clamp(1.0 - self.clip, 1.0 + self.clip)
            return torch.maximum(-reward_N * rho_N, -reward_N * clipped_N)
        return -reward_N * rho_N


@dataclass(frozen=True)
class NegativeLogLikelihood(TokenLoss):
    """-log pi_S(x).  On the teacher's tokens: forward KL, one sample at a time; the teacher needs no probabilities.

    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -2.0]))
    >>> NegativeLogLikelihood()(some_tokens(token_ids_N=[5, 6]), view, None)
    tensor([1., 2.])
    """

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        return -student.logprobs_N


@dataclass(frozen=True)
class SampledReverseKL(TokenLoss):
    """(log pi_S - log pi_T)^2 / 2 on the student's own tokens ("k2").  Gradient: that of KL(student || teacher).

    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -2.0]))
    >>> SampledReverseKL()(some_tokens(teacher_logprobs_N=[-1.0, -4.0]), view, None)
    tensor([0., 2.])
    """

    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        return 0.5 * (student.logprobs_N - tokens.teacher_logprobs_N) ** 2


@dataclass(frozen=True)
class SampledForwardKL(TokenLoss):
    """e^r - 1 - r with r = log pi_T - log pi_S on the student's own tokens ("k3").

    Its *value* estimates reverse KL, its *gradient* is that of KL(teacher || student).

    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -2.0]))
    >>> SampledForwardKL()(some_tokens(teacher_logprobs_N=[-1.0, -4.0]), view, None)
    tensor([0.0000, 1.1353])
    """

    own_needs = Needs.SAMPLED

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        log_ratio_N = tokens.teacher_logprobs_N - student.logprobs_N
        return log_ratio_N.expm1() - log_ratio_N


@dataclass(frozen=True)
class DivergenceLoss(TokenLoss):
    """What the divergences share: the tokens to sum over, and what happens to the probability of the others."""

    support: Support = "full"
    top_k: Count = 64
    outside: Outside = "ignore"
    target: Target | None = None
    """A transformation of the teacher's distribution (full support only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside == "renormalise" and self.support != "full" and self.top_k == 1:
            raise ConfigError(
                "renormalising over one token makes both probabilities 1 and the loss identically 0. "
                "Use top_k >= 2, or outside='bucket' or 'generalised'."
            )
        if self.target is not None and self.support != "full":
            raise ConfigError("a transformed target needs the teacher's whole distribution: use support='full'.")

    @property
    def own_needs(self) -> Needs:  # type: ignore[override]
        top, own = Needs.TOPK, Needs.STUDENT_TOPK
        return {
            "full": Needs.FULL,
            "teacher_top_k": top,
            "student_top_k": own,
            "union": top | own,
            "intersection": top | own,
        }[self.support]

    @property
    def teacher_top_k(self) -> int:
        return self.top_k if self.own_needs & Needs.TOPK else 0

    @property
    def student_top_k(self) -> int:
        return self.top_k if self.own_needs & Needs.STUDENT_TOPK else 0

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        log_t, log_s = on_support(self.support, self.top_k, tokens, student)
        if self.target is not None:
            log_t = self.target(log_t, log_s.detach())
        if self.outside == "renormalise":
            log_t, log_s = log_t.log_softmax(-1), log_s.log_softmax(-1)
        elif self.outside == "renormalise_teacher":
            log_t = log_t.log_softmax(-1)
        elif self.outside == "bucket":
            log_t, log_s = add_bucket(log_t), add_bucket(log_s)
        return self.between(log_t, log_s)

    def between(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class ForwardKL(DivergenceLoss):
    """sum_v T log(T / S): KL(teacher || student).  With `skew` a: against a T + (1 - a) S instead of S.

    Gradient (logits): P S - T on the support with P the teacher's mass there, bounded by 2 in L1.  The fixed point of
    `ignore` on top-k is the teacher renormalised; `generalised` (+ S - T) and `bucket` have the teacher itself.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> ForwardKL()(some_tokens(teacher_full_logprobs_NV=teacher.log()), view, None)
    tensor([0.1838])
    """

    skew: Annotated[float, Range(at_least=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside == "stop_gradient":
            raise ConfigError("outside='stop_gradient' corrects reverse KL; for forward KL use 'generalised'.")

    def between(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        t, s = log_t.exp(), log_s.exp()
        log_q = log_s
        if self.skew:
            log_q = log_mixture(log_t, log_s, self.skew)
        loss = expected_gap(t, log_t, log_q)
        return loss + (s - t).sum(-1) if self.outside == "generalised" else loss


@dataclass(frozen=True)
class ReverseKL(DivergenceLoss):
    """sum_v S log(S / T): KL(student || teacher).

    On a top-k support `ignore` is not a divergence: its fixed point is S / T = 1/e, and probability leaks out of the
    support.  `stop_gradient` S (sg[log S] - log T), `generalised` (- S + T) and `bucket` have the teacher as their
    fixed point; `renormalise` fixes the shape and leaves the mass free.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> ReverseKL()(some_tokens(teacher_full_logprobs_NV=teacher.log()), view, None)
    tensor([0.1920])
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside == "renormalise_teacher":
            raise ConfigError("outside='renormalise_teacher' belongs to forward KL; for reverse KL use 'renormalise'.")

    def between(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        t, s = log_t.exp(), log_s.exp()
        if self.outside == "stop_gradient":
            return expected_gap(s, log_s.detach(), log_t)
        loss = expected_gap(s, log_s, log_t)
        return loss + (t - s).sum(-1) if self.outside == "generalised" else loss


@dataclass(frozen=True)
class JensenShannon(DivergenceLoss):
    """beta KL(T || M) + (1 - beta) KL(S || M),  M = beta T + (1 - beta) S,  0 < beta < 1.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> JensenShannon(beta=0.5)(some_tokens(teacher_full_logprobs_NV=teacher.log()), view, None)
    tensor([0.0462])
    """

    beta: Annotated[
        float,
        Range(
            above=0,
            below=1,
            advice="the divergence vanishes at both ends; use forward KL (GKD's beta 0) or reverse KL (GKD's beta 1)",
        ),
    ] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside in ("stop_gradient", "renormalise_teacher", "generalised"):
            raise ConfigError(f"outside={self.outside!r} is not defined for Jensen-Shannon: use 'bucket'.")

    def between(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        log_m = log_mixture(log_t, log_s, self.beta)
        forward, reverse = expected_gap(log_t.exp(), log_t, log_m), expected_gap(log_s.exp(), log_s, log_m)
        return self.beta * forward + (1.0 - self.beta) * reverse


@dataclass(frozen=True)
class StateReward(TokenLoss):
    """A divergence used as a reward: -reward * rho with reward = -sg[divergence].

    The divergence depends on the state, not on the drawn token, so over all tokens its expected gradient is exactly
    zero and only noise remains.  Restricted to outliers it makes the tokens that the student overrates less likely, and
    nothing else.  It reproduces published collapses; methods that use it warn.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> tokens = some_tokens(teacher_full_logprobs_NV=teacher.log(), behavior_logprobs_N=student[:, 0].log())
    >>> StateReward(ReverseKL())(tokens, view, None)
    tensor([0.1920])
    """

    divergence: DivergenceLoss

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        cost_N = self.divergence(tokens, student, None).detach()
        return cost_N * (student.logprobs_N - tokens.behavior_logprobs_N).exp()
