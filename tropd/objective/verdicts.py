"""The grader's verdict against the teacher's: gates on tokens and on whole responses.

The verdict on a response is + where the grader's reward is above `above`, else -.  The teacher's on a token is the sign
of its reward so far, such as log pi_T - log pi_S.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Finite
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Reward, Selector
from tropd.types import Author


@dataclass(frozen=True)
class SignGate(Reward):
    """The reward where its sign is the grader's verdict, else 0 (OPDVR, arXiv 2608.24696).

    >>> tokens = some_tokens(token_ids_N=[5, 6, 7, 8], sequences_N=[0, 0, 1, 1], rewards_S=[1.0, 0.0])
    >>> SignGate()(torch.tensor([0.5, -0.5, 0.5, -0.5]), tokens, Context())
    tensor([ 0.5000,  0.0000,  0.0000, -0.5000])
    """

    above: Finite = 0.0
    own_needs = Needs.REWARD

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return torch.where(_agrees(reward_N, tokens, self.above), reward_N, 0.0)


@dataclass(frozen=True)
class SignExtrapolation(Reward):
    """+ (lambda - 1) (log pi_T - log pi_ref), with lambda = `agree` where the reward's sign is the grader's verdict and
    `conflict` elsewhere (SG-OPD, arXiv 2606.09304); `against` names the reader that gives log pi_ref.

    Where lambda = 1 nothing is added, not even a rounding error.

    >>> tokens = some_tokens(teacher_logprobs_N=[-0.5, -0.5], sequences_N=[0, 1], rewards_S=[1.0, 0.0])
    >>> tokens = tokens.told("start", teacher_logprobs_N=torch.tensor([-2.0, -2.0]))
    >>> SignExtrapolation(agree=1.8)(torch.tensor([1.0, 1.0]), tokens, Context())  # 1 + 0.8 * 1.5
    tensor([2.2000, 1.0000])
    """

    agree: Finite = 1.8
    conflict: Finite = 1.0
    against: str = "start"
    above: Finite = 0.0

    def own_asks(self, reader: str) -> Mapping[str, Needs]:
        return {reader: Needs.SAMPLED | Needs.REWARD, self.against: Needs.SAMPLED}

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        reference_N = at_least_float32(tokens.of(self.against).teacher_logprobs_N)
        delta_N = at_least_float32(tokens.teacher_logprobs_N) - reference_N
        agree, conflict = (reward_N.new_tensor(x - 1.0) for x in (self.agree, self.conflict))
        factor_N = torch.where(_agrees(reward_N, tokens, self.above), agree, conflict)
        return torch.where(factor_N == 0.0, reward_N, reward_N + factor_N * delta_N)


@dataclass(frozen=True)
class VerdictsAgree(Selector):
    """1 on the student's tokens of responses that teacher and grader judge alike: the sign of the sum of
    log pi_T - log pi_S over what the student wrote is the grader's verdict (RG-OPD, arXiv 2607.04037).

    >>> tokens = some_tokens(
    ...     student_logprobs_N=[-1.0, -1.0, -1.0], teacher_logprobs_N=[-0.5, -1.2, -3.0], sequences_N=[0, 0, 1],
    ...     rewards_S=[1.0, 1.0],
    ... )
    >>> VerdictsAgree()(tokens, Context())  # sums 0.3 and -2
    tensor([1., 1., 0.])
    """

    above: Finite = 0.0
    own_needs = Needs.SAMPLED | Needs.REWARD
    own_reach = Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        ratio_N = torch.where(member_N, tokens.log_ratio_N, 0.0).double()
        total_S = ratio_N.new_zeros(len(tokens.keys_S)).index_add_(0, tokens.sequences_N, ratio_N)
        agrees_N = _agrees(total_S[tokens.sequences_N], tokens, self.above)
        return as_weight(agrees_N & member_N, tokens.log_ratio_N)


def _agrees(reward_N: Tensor, tokens: Tokens, above: float) -> Tensor:
    """Where both have the same sign; a reward of 0 agrees with nobody."""
    passed_N = (tokens.rewards_S > above)[tokens.sequences_N]
    return torch.where(passed_N, reward_N > 0.0, reward_N < 0.0)
