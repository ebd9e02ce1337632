"""How good a written token was: each piece takes the reward so far and gives the next one.  No gradient.

Log-ratios and divergences are in nats.  `PolicyGradient` turns the final reward a into -a * grad log pi_S(x).  With x
drawn from the student, its expectation is the gradient of the divergence that the piece names;
`tests/objective/test_theorems.py` enumerates it.  Paste an example after `from tropd.objective.examples import *`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from tropd.base.ranges import Finite, Positive, PositiveShare, Range, Share
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens, at_least_float32
from tropd.objective.measures import padded
from tropd.objective.terms import Reward, check_piece
from tropd.types import Author


@dataclass(frozen=True)
class chain(Reward):
    """Rewards applied one after another, starting from 0.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-1.0, -9.0])
    >>> chain(LogRatio(), Clip(low=-3.0))(torch.zeros(2), tokens, Context())
    tensor([-0.5000, -3.0000])
    """

    links: tuple[Reward, ...]

    def __init__(self, *links: Reward, reader: str | None = None) -> None:
        for link in links:
            check_piece(link, Reward, "a link of a chain of rewards")
        object.__setattr__(self, "links", links)
        object.__setattr__(self, "reader", reader)

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        for link in self.links:
            reward_N = link(reward_N, tokens, context)
        return reward_N


@dataclass(frozen=True)
class LogRatio(Reward):
    """+ scale * (log pi_T - log pi_S) of the written token.  Gradient: that of KL(student || teacher).

    `against` "behavior" subtracts the log-probability of whatever drew the token instead of the student's own, and the
    name of a reader that of this reader.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -2.0], teacher_logprobs_N=[-1.0, -1.0])
    >>> LogRatio()(torch.zeros(2), tokens, Context())
    tensor([-0.5000,  1.0000])
    """

    scale: Finite = 1.0
    against: str = "student"
    own_needs = Needs.SAMPLED

    def own_asks(self, reader: str) -> dict[str, Needs]:
        other = {} if self.against in ("student", "behavior") else {self.against: Needs.SAMPLED}
        return {reader: Needs.SAMPLED, **other}

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        if self.against == "student":
            return reward_N + self.scale * tokens.log_ratio_N
        if self.against == "behavior":
            other_N = tokens.behavior_logprobs_N
        else:
            other_N = tokens.of(self.against).teacher_logprobs_N
        return reward_N + self.scale * (at_least_float32(tokens.teacher_logprobs_N) - at_least_float32(other_N))


@dataclass(frozen=True)
class Clip(Reward):
    """The reward, cut to [low, high].

    >>> Clip(low=-3.0)(torch.tensor([-8.0, 0.5]), some_tokens(token_ids_N=[5, 6]), Context())
    tensor([-3.0000,  0.5000])
    """

    low: Annotated[float, Range(unbounded=True)] = -math.inf
    high: Annotated[float, Range(unbounded=True)] = math.inf

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return reward_N.clamp(self.low, self.high)


@dataclass(frozen=True)
class ProximalTeacher(Reward):
    """log(alpha e^r + 1 - alpha): a log-ratio against the teacher alpha pi_T + (1 - alpha) pi_S instead of pi_T.

    It never falls below log(1 - alpha), however unlikely the token is to the teacher; alpha = 1 changes nothing.

    >>> ProximalTeacher(alpha=0.9)(torch.tensor([-50.0, 1.0]), some_tokens(token_ids_N=[5, 6]), Context())
    tensor([-2.3026,  0.9347])
    """

    alpha: PositiveShare

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        if self.alpha == 1.0:
            return reward_N
        rest = torch.full_like(reward_N, math.log1p(-self.alpha))
        return torch.logaddexp(reward_N + math.log(self.alpha), rest)


Divergence = Literal["reverse_kl", "forward_kl", "jensen_shannon"]


@dataclass(frozen=True)
class DivergenceWeight(Reward):
    """The reward whose policy gradient is that of D_f = E_S[f(u)], u = pi_T / pi_S (OPD+, arXiv 2606.01039).

        w(u) = -f(u) + u f'(u):   forward_kl  u       reverse_kl  log u - 1       jensen_shannon  log((1 + u) / 2) / 2

    The reward so far must be log u.  The naive reward -f(u) points the wrong way for forward KL (`naive`, kept for the
    test that shows it).

    >>> DivergenceWeight("forward_kl")(torch.tensor([-1.0, 0.0]), some_tokens(token_ids_N=[5, 6]), Context())
    tensor([0.3679, 1.0000])
    """

    divergence: Divergence
    naive: bool = False

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        log_mean_N = torch.logaddexp(reward_N, torch.zeros_like(reward_N)) - math.log(2.0)
        u_N = reward_N.exp()
        if self.divergence == "reverse_kl":
            return reward_N if self.naive else reward_N - 1.0
        if self.divergence == "forward_kl":
            return torch.special.entr(u_N) if self.naive else u_N
        if self.naive:
            return 0.5 * (torch.special.entr(u_N) + (1.0 + u_N) * log_mean_N)  # entr(u) = -u log u, 0 at 0
        return 0.5 * log_mean_N


@dataclass(frozen=True)
class FutureSum(Reward):
    """sum_{i >= t} discount^(i - t) r_i over the rest of the sequence.

    `current`: whether i = t counts.  `mean`: divided by the number of tokens in the sum.

    >>> FutureSum(discount=0.5)(torch.tensor([1.0, 0.0, 4.0]), some_tokens(token_ids_N=[5, 6, 7]), Context())
    tensor([2., 2., 4.])
    """

    discount: Share = 1.0
    current: bool = True
    mean: bool = False
    own_reach = Reach.SEQUENCE

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        reward_ST = padded(reward_N, tokens)
        count_ST = padded(torch.ones_like(reward_N), tokens)
        total_S, left_S = torch.zeros_like(reward_ST[:, :1]), torch.zeros_like(reward_ST[:, :1])
        columns = []
        for t in range(reward_ST.shape[1] - 1, -1, -1):
            after, num_after = self._discounted(total_S), left_S
            total_S, left_S = reward_ST[:, t : t + 1] + after, left_S + count_ST[:, t : t + 1]
            column, summed = (total_S, left_S) if self.current else (after, num_after)
            columns.append(column / summed.clamp_min(1.0) if self.mean else column)
        if not columns:
            return reward_N
        future_ST = torch.cat(columns[::-1], dim=1)
        return future_ST[tokens.sequences_N, tokens.positions_N]

    def _discounted(self, total: Tensor) -> Tensor:
        """A later reward may be -inf, and 0 * inf is NaN."""
        return self.discount * total if self.discount else torch.zeros_like(total)


@dataclass(frozen=True)
class PlusFutureMean(Reward):
    """+ the mean reward of the later tokens of the sequence.

    >>> PlusFutureMean()(torch.tensor([1.0, 0.0, 4.0]), some_tokens(token_ids_N=[5, 6, 7]), Context())
    tensor([3., 4., 4.])
    """

    own_reach = Reach.SEQUENCE

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return reward_N + FutureSum(current=False, mean=True)(reward_N, tokens, context)


@dataclass(frozen=True)
class Standardise(Reward):
    """(r - mean) / std over the student's tokens of the batch on all ranks, or of each group of rollouts.

    Subtracting a constant mean changes no expected gradient; dividing by the std rescales the learning rate.

    >>> Standardise()(torch.tensor([1.0, 3.0]), some_tokens(token_ids_N=[5, 6]), Context())
    tensor([-1.,  1.])
    """

    scope: Literal["batch", "group"] = "batch"
    divide: bool = True
    floor: Positive = 1e-4
    """Smallest standard deviation: well above float32 rounding, or equal models would be driven by noise."""

    @property
    def reach(self) -> Reach:
        return Reach.BATCH if self.scope == "batch" else Reach.GROUP

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        member_N = tokens.authors_N == Author.STUDENT
        group_N = torch.zeros_like(tokens.sequences_N)
        if self.scope == "group":
            group_N = tokens.groups_S[tokens.sequences_N]
        r, g = context.world.gather(reward_N[member_N]), context.world.gather(group_N[member_N])
        names, index = torch.unique(g, return_inverse=True)
        if len(names) == 0:
            return torch.zeros_like(reward_N)
        count = torch.bincount(index, minlength=len(names)).to(r.dtype)
        mean = r.new_zeros(len(names)).index_add_(0, index, r) / count
        spread = r.new_zeros(len(names)).index_add_(0, index, (r - mean[index]) ** 2) / count
        slot_N = torch.searchsorted(names, group_N).clamp(max=len(names) - 1)
        centred_N = reward_N - mean[slot_N]
        return centred_N / spread.sqrt().clamp_min(self.floor)[slot_N] if self.divide else centred_N


@dataclass(frozen=True)
class Scale(Reward):
    """factor * r.

    >>> Scale(0.5)(torch.tensor([1.0, 3.0]), some_tokens(token_ids_N=[5, 6]), Context())
    tensor([0.5000, 1.5000])
    """

    factor: Finite

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return self.factor * reward_N


@dataclass(frozen=True)
class ReverseKLBaseline(Reward):
    """+ KL(student || teacher) at the position: LogRatio then has mean 0 over the student's draws.

    The gradient stays unbiased, since what is added does not depend on the drawn token.  Where the divergence is
    infinite nothing is added.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5], teacher_logprobs_N=[-1.0], reverse_kl_N=[0.2])
    >>> chain(LogRatio(), ReverseKLBaseline())(torch.zeros(1), tokens, Context())
    tensor([-0.3000])
    """

    own_needs = Needs.REVERSE_KL

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return reward_N + tokens.reverse_kl_N.masked_fill(tokens.reverse_kl_N == torch.inf, 0.0)


@dataclass(frozen=True)
class GroupAdvantage(Reward):
    """+ weight * (the grader's reward - the mean reward of the group), each sequence counted once.

    `divide`: by the standard deviation within the group (with n - 1, plus 1e-4), which is GRPO's advantage (arXiv
    2402.03300).  A sequence without others in its group has advantage 0.

    >>> tokens = some_tokens(token_ids_N=[5, 6, 7], sequences_N=[0, 0, 1], rewards_S=[1.0, 0.0], groups_S=[0, 0])
    >>> GroupAdvantage()(torch.zeros(3), tokens, Context())
    tensor([ 0.5000,  0.5000, -0.5000])
    >>> GroupAdvantage(divide=True)(torch.zeros(3), tokens, Context())
    tensor([ 0.7070,  0.7070, -0.7070])
    """

    weight: Finite = 1.0
    divide: bool = False
    own_needs = Needs.REWARD
    own_reach = Reach.GROUP

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        rewards, groups = context.world.gather(tokens.rewards_S), context.world.gather(tokens.groups_S)
        names, index = torch.unique(groups, return_inverse=True)
        count = torch.bincount(index, minlength=len(names)).to(rewards.dtype)
        mean = rewards.new_zeros(len(names)).index_add_(0, index, rewards) / count
        slot_S = torch.searchsorted(names, tokens.groups_S)
        advantage_S = tokens.rewards_S - mean[slot_S]
        if self.divide:
            squares = rewards.new_zeros(len(names)).index_add_(0, index, (rewards - mean[index]) ** 2)
            deviation = (squares / (count - 1.0).clamp_min(1.0)).sqrt()
            advantage_S = advantage_S / (deviation + 1e-4)[slot_S]  # TRL's; rounding of equal rewards stays small
        return reward_N + self.weight * advantage_S[tokens.sequences_N].to(reward_N.dtype)
