"""Policies that draw each token from student and teacher together: the teacher must be a model in this process.

Blended         from a mixture of both that stays near the student (TRB)
MixedSampling   from a weighted mean of both (MiniLLM)
Interleaved     the student draws, the teacher writes over what it would never write (SKD)

Axes: B texts, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.linalg import vecdot

from tropd.base.ranges import Count, NotNegative, Share
from tropd.errors import ConfigError
from tropd.methods.decoding import Decoding
from tropd.methods.policies import RolloutPolicy
from tropd.objective.memory import Memory
from tropd.objective.schedules import Schedule
from tropd.objective.support import expected_gap, log_mixture

_MOST_STEPS = 24
"""As many halvings of [0, 1] are as fine as float32; a few steps are enough as a rule."""


@dataclass(frozen=True, kw_only=True)
class Blended(RolloutPolicy):
    """Each token is drawn from p^(1 - beta) q^beta, normalised, with p the student and q the teacher: the largest beta
    in [0, 1] whose mixture has KL(mixture || student) of at most epsilon (TRB).

    Where epsilon has come down to 0, the student writes alone, at no cost of the teacher.

    >>> fading = Blended(epsilon=Schedule(shape="linear", start=0.01, end=0.0, until=0.1))
    >>> [fading.decoding(u, Memory()) for u in (0.0, 0.05, 0.1)]
    [Blend(epsilon=0.01), Blend(epsilon=0.005), None]
    """

    epsilon: Schedule = field(default_factory=lambda: Schedule(shape="linear", start=0.01, end=0.0, until=0.0625))
    """The budget in nats of each token, over training (paper: linear from 0.001 to 0.05 down to 0 after 15, 25 or 50 of
    400 steps; the middle of each is taken)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.epsilon.start, self.epsilon.end) < 0:
            raise ConfigError(f"epsilon goes through {self.epsilon}, but a divergence is never negative.")

    @property
    def description(self) -> str:
        return (
            "Each token is drawn from a geometric mixture of student and teacher, the one nearest to the teacher whose "
            f"KL divergence from the student is at most epsilon: {self.epsilon} nats over training. Where epsilon is "
            "0, the student writes alone."
        )

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        epsilon = self.epsilon(progress)
        return Blend(epsilon=epsilon) if epsilon > 0 else None


@dataclass(frozen=True, kw_only=True)
class MixedSampling(RolloutPolicy):
    """Each token is drawn from alpha q + (1 - alpha) p, with p the student and q the teacher (MiniLLM).

    >>> MixedSampling(alpha=0.2).decoding(0.0, Memory())
    Mix(alpha=0.2)
    """

    alpha: Share = 0.2
    """The teacher's part (MiniLLM: 0.2). In [0, 1]."""

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        return Mix(alpha=self.alpha) if self.alpha > 0 else None


@dataclass(frozen=True, kw_only=True)
class Interleaved(RolloutPolicy):
    """The student draws each token; one that is not among the teacher's likeliest top_k is replaced by a token that the
    teacher draws (speculative knowledge distillation).

    >>> Interleaved().decoding(0.0, Memory())
    Overwrite(top_k=25)
    """

    top_k: Count = 25
    """How many of the teacher's likeliest tokens stand (paper: 25). The whole vocabulary is on-policy. At least 1."""

    def decoding(self, progress: float, memory: Memory) -> Decoding | None:
        return Overwrite(top_k=self.top_k)


@dataclass(frozen=True, kw_only=True)
class Blend(Decoding):
    """The geometric mixture that uses up a budget of nats."""

    epsilon: NotNegative

    def blend(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        return geometric(student_BV, teacher_BV, largest_beta(student_BV, teacher_BV, self.epsilon))


@dataclass(frozen=True, kw_only=True)
class Mix(Decoding):
    """The weighted mean of two distributions."""

    alpha: Share

    def blend(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        if self.alpha in (0.0, 1.0):
            return teacher_BV if self.alpha else student_BV
        return log_mixture(teacher_BV, student_BV, self.alpha)


@dataclass(frozen=True, kw_only=True)
class Overwrite(Decoding):
    """The teacher writes over tokens outside its top-k; tokens as likely as the last of these stand."""

    top_k: Count

    def overwritten(self, student_BV: Tensor, teacher_BV: Tensor, ids_B: Tensor) -> Tensor | None:
        if self.top_k >= teacher_BV.shape[1]:
            return None
        drawn_B1 = teacher_BV.gather(1, ids_B[:, None])
        return ((teacher_BV > drawn_B1).sum(-1) >= self.top_k) | (drawn_B1[:, 0] == -torch.inf)


def geometric(log_p_BV: Tensor, log_q_BV: Tensor, beta_B: Tensor) -> Tensor:
    """(1 - beta) log p + beta log q - log Z; a row with beta = 0 is p itself.  A token that p cannot write stays so."""
    beta_B1 = beta_B[:, None]
    mixed_BV = log_p_BV + beta_B1 * _gaps(log_p_BV, log_q_BV).masked_fill(beta_B1 == 0, 0.0)
    return torch.where(beta_B1 == 0, log_p_BV, mixed_BV.log_softmax(-1))


def largest_beta(log_p_BV: Tensor, log_q_BV: Tensor, epsilon: float) -> Tensor:
    """For each row the largest beta in [0, 1] with KL(mixture || p) <= epsilon.

    The divergence grows with beta, d KL / d beta = beta Var[log q / p], from -log of the mass that p has where q is not
    0.  Its root above that is nearly linear in beta, so a few steps of Newton's method reach the budget; one that would
    leave the interval in which it lies is replaced by halving that.  A row that is there stays: rows are independent.
    """
    p_BV, gaps_BV = log_p_BV.exp(), _gaps(log_p_BV, log_q_BV)
    missing_BV = gaps_BV == -torch.inf
    floor_B = -p_BV.masked_fill(missing_BV, 0.0).sum(-1).clamp(max=1.0).log()
    # Less their mean: log Z is of the order of the divergence then, and little is lost where the two are subtracted.
    gaps_BV = gaps_BV - vecdot(p_BV, gaps_BV.masked_fill(missing_BV, 0.0))[:, None]
    finite_BV = gaps_BV.masked_fill(missing_BV, 0.0)
    squares_BV, likeliest_B1 = finite_BV.square(), (log_p_BV + finite_BV.clamp(max=0.0)).argmax(-1, keepdim=True)

    def measured(beta_B: Tensor) -> tuple[Tensor, Tensor]:
        """KL(mixture || p), and the variance of the gaps under the mixture; beta > 0, so that no 0 * inf arises."""
        weights_BV = torch.addcmul(log_p_BV, gaps_BV, beta_B[:, None])
        mixture_BV = weights_BV.log_softmax(-1)
        log_z_B = (weights_BV.gather(1, likeliest_B1) - mixture_BV.gather(1, likeliest_B1))[:, 0]
        mixture_BV = mixture_BV.exp_()
        mean_B = vecdot(mixture_BV, finite_BV)
        return beta_B * mean_B - log_z_B, vecdot(mixture_BV, squares_BV) - mean_B.square()

    low_B, beta_B = torch.zeros_like(floor_B), torch.ones_like(floor_B)
    high_B, rounding = beta_B, torch.finfo(log_p_BV.dtype).eps
    near = max(1e-9 * epsilon, (1e3 * epsilon + 4) * rounding)
    spent_B, variance_B = measured(beta_B)
    done_B = (spent_B <= epsilon) | ~(floor_B < epsilon)
    beta_B = torch.where(floor_B < epsilon, beta_B, 0.0)  # also where the two share no token
    for _ in range(_MOST_STEPS):
        if bool(done_B.all()):
            break
        root_B = (spent_B - floor_B).clamp(min=0.0).sqrt()
        next_B = beta_B + ((epsilon - floor_B).clamp(min=0.0).sqrt() - root_B) * 2 * root_B / (beta_B * variance_B)
        inside_B = (next_B > low_B) & (next_B < high_B)
        beta_B = torch.where(done_B, beta_B, torch.where(inside_B, next_B, (low_B + high_B) / 2))
        spent_B, variance_B = measured(beta_B)
        fits_B = spent_B <= epsilon
        low_B, high_B = torch.where(fits_B, beta_B, low_B), torch.where(fits_B, high_B, beta_B)
        done_B = done_B | ((spent_B - epsilon).abs() <= near)
    return torch.where(done_B, beta_B, low_B)


def divergence(log_p_BV: Tensor, log_q_BV: Tensor) -> Tensor:
    """KL(p || q) of each row."""
    return expected_gap(log_p_BV.exp(), log_p_BV, log_q_BV)


def _gaps(log_p_BV: Tensor, log_q_BV: Tensor) -> Tensor:
    """log q - log p, 0 where p is 0: there log p alone keeps the token out."""
    return torch.where(log_p_BV == -torch.inf, 0.0, log_q_BV - log_p_BV)
