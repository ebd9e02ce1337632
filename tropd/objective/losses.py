"""What to minimise at a token, in nats.  Each loss is named by the gradient that it produces.

Two kinds:
  PolicyGradient   weighs log pi_S of the written token by a reward: -a * grad log pi_S(x)
  divergences      sum over a support and are differentiated through the student's probabilities

`StateReward` is the only way from the second kind to the first, and says what goes wrong.  Paste an example after
`from tropd.objective.examples import *`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor

from tropd.base.ranges import Positive, Range
from tropd.errors import ConfigError, EvidenceError
from tropd.objective.divergence import DivergenceLoss
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.rewards import LogRatio
from tropd.objective.support import log_mixture, weighed_gaps
from tropd.objective.terms import Reward, TokenLoss, check_piece


@dataclass(frozen=True)
class PolicyGradient(TokenLoss):
    """-a * rho with rho = pi_S(x) / mu(x), mu the policy that sampled x; rho = 1 on the first step after a rollout.

    Gradient: -a rho grad log pi_S(x).  With x ~ pi_S its expectation is that of the divergence the reward names.
    `clip`  PPO: no gain from moving rho beyond 1 - clip or 1 + clip_high, which is 1 + clip by default.
    `cap`   truncated importance weight min(rho, cap).

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -2.0], teacher_logprobs_N=[-0.5, -4.0])
    >>> logprobs_N = torch.tensor([-1.0, -2.0], requires_grad=True)
    >>> PolicyGradient()(tokens, StudentView(logprobs_N=logprobs_N), tokens.log_ratio_N).sum().backward()
    >>> logprobs_N.grad  # minus the reward: a step makes the first token likelier, the second less likely
    tensor([-0.5000,  2.0000])
    """

    reward: Reward = field(default_factory=LogRatio)
    clip: Positive | None = None
    cap: Positive | None = None
    clip_high: Positive | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.reward, Reward, "the reward of a policy gradient")
        if self.clip is None and self.clip_high is not None:
            raise ConfigError("a policy gradient's `clip_high` is the upper end of a PPO `clip`: give both.")
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
            clipped_N = rho_N.clamp(1.0 - self.clip, 1.0 + (self.clip_high or self.clip))
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

    def entries(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        t, s = log_t.exp(), log_s.exp()
        gaps = weighed_gaps(t, log_t, log_mixture(log_t, log_s, self.skew) if self.skew else log_s)
        return gaps + (s - t) if self.outside == "generalised" else gaps


@dataclass(frozen=True)
class ReverseKL(DivergenceLoss):
    """sum_v S log(S / T): KL(student || teacher).  With `skew` a: against a S + (1 - a) T instead of T.

    On a top-k support `ignore` is not a divergence: its fixed point is S / T = 1/e, and probability leaks out of the
    support.  `stop_gradient` S (sg[log S] - log T), `generalised` (- S + T) and `bucket` have the teacher as their
    fixed point; `renormalise` fixes the shape and leaves the mass free.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> ReverseKL()(some_tokens(teacher_full_logprobs_NV=teacher.log()), view, None)
    tensor([0.1920])
    """

    skew: Annotated[float, Range(at_least=0, below=1)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside == "renormalise_teacher":
            raise ConfigError("outside='renormalise_teacher' belongs to forward KL; for reverse KL use 'renormalise'.")
        if self.outside == "stop_gradient" and self.skew:
            raise ConfigError("outside='stop_gradient' corrects plain reverse KL; with a skew use 'generalised'.")

    def entries(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        log_t = log_mixture(log_t, log_s, 1.0 - self.skew) if self.skew else log_t
        t, s = log_t.exp(), log_s.exp()
        if self.outside == "stop_gradient":
            return weighed_gaps(s, log_s.detach(), log_t)
        gaps = weighed_gaps(s, log_s, log_t)
        return gaps + (t - s) if self.outside == "generalised" else gaps


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

    def entries(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        log_m = log_mixture(log_t, log_s, self.beta)
        forward, reverse = weighed_gaps(log_t.exp(), log_t, log_m), weighed_gaps(log_s.exp(), log_s, log_m)
        return self.beta * forward + (1.0 - self.beta) * reverse


def divergence_at(beta: float, **over: Any) -> DivergenceLoss:
    """Jensen-Shannon at beta, and by convention, not by continuity, forward KL at 0 and reverse KL at 1."""
    ends: dict[float, type[DivergenceLoss]] = {0.0: ForwardKL, 1.0: ReverseKL}
    return ends[beta](**over) if beta in ends else JensenShannon(beta=beta, **over)


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


@dataclass(frozen=True)
class AtMost(TokenLoss):
    """Another loss, at most `nats` at each token; a token above has no gradient.

    So clamping at a quantile of the batch has the gradient of leaving the tokens above it out.  For reverse KL that is
    the selector `~TopFraction(ReverseKLAt(), 0.05)`, which takes the quantile over the whole batch.

    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -4.0]))
    >>> AtMost(NegativeLogLikelihood(), nats=2.0)(some_tokens(token_ids_N=[5, 6]), view, None)
    tensor([1., 2.])
    """

    loss: TokenLoss
    nats: Positive

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.loss, TokenLoss, "the loss that is clamped")
        object.__setattr__(self, "reader", self.loss.reader or self.reader)  # whose the reward is, too

    @property
    def reward(self) -> Reward | None:  # type: ignore[override]
        return self.loss.reward

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        loss_N = self.loss(tokens, student, reward_N)
        if not bool((loss_N == torch.inf).any()):
            return loss_N.clamp_max(self.nats)
        rows = (loss_N != torch.inf).nonzero().flatten()  # the gradient of an infinite loss is NaN, even times 0
        finite = self.loss(tokens.rows(rows), student.rows(rows), None if reward_N is None else reward_N[rows])
        return torch.full_like(loss_N, self.nats).index_copy(0, rows, finite.clamp_max(self.nats))


@dataclass(frozen=True)
class ImportanceWeighted(TokenLoss):
    """Another loss times min(pi_S(x) / mu(x), cap), mu the policy that sampled x; no gradient through the ratio.

    For a batch that an older student wrote; 1 on the first step after a rollout.

    >>> tokens = some_tokens(behavior_logprobs_N=[-1.0, -3.0])
    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -2.0]))
    >>> ImportanceWeighted(NegativeLogLikelihood(), cap=2.0)(tokens, view, None)
    tensor([1., 4.])
    """

    loss: TokenLoss
    cap: Positive = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.loss, TokenLoss, "the loss that is weighted")
        object.__setattr__(self, "reader", self.loss.reader or self.reader)  # whose the reward is, too

    @property
    def reward(self) -> Reward | None:  # type: ignore[override]
        return self.loss.reward

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        ratio_N = (student.logprobs_N.detach() - tokens.behavior_logprobs_N).exp()
        return self.loss(tokens, student, reward_N) * ratio_N.clamp_max(self.cap)
