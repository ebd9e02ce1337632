"""A reward made of powers of probabilities, bounded by nature, in place of the difference of their logarithms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from tropd.base.ranges import Positive
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.terms import Reward


@dataclass(frozen=True)
class PowerDifference(Reward):
    """+ pi_T^alpha - pi_S^alpha of the written token, in [-1, 1] (PowerOPD, arXiv 2606.17199).

    Gradient: that of sum_v S^(1 + alpha) / (1 + alpha) - S T^alpha, a density power divergence but for a constant; its
    minimum is S = T.  Divided by alpha, it tends to the log-ratio as alpha -> 0.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-0.1, -50.0])
    >>> PowerDifference(alpha=1.0)(torch.zeros(2), tokens, Context())
    tensor([ 0.2983, -0.6065])
    """

    alpha: Positive
    own_needs = Needs.SAMPLED

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        teacher_N, student_N = (at_least_float32(x) for x in (tokens.teacher_logprobs_N, tokens.student_logprobs_N))
        return reward_N + ((self.alpha * teacher_N).exp() - (self.alpha * student_N).exp())
