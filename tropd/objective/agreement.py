"""Pieces that look at what several readers say of the same token (UniSD, arXiv 2605.06597)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.base.ranges import NotNegative, Positive, PositiveShare
from tropd.errors import ConfigError
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.measures import quantile
from tropd.objective.terms import Selector, TokenLoss
from tropd.types import Author

Spread = Literal["variance", "range"]


def spread_of(logprobs_KN: Tensor, by: Spread) -> Tensor:
    """The variance or the range of K numbers per token: 0 where all are the same, -inf included, and inf where some of
    them are -inf."""
    low_N, high_N = logprobs_KN.aminmax(dim=0)
    spread_N = high_N - low_N if by == "range" else logprobs_KN.var(0, correction=0)
    return torch.where(low_N == high_N, 0.0, torch.nan_to_num(spread_N, nan=torch.inf, posinf=torch.inf))


@dataclass(frozen=True)
class Agreement(Selector):
    """A weight that is 1 where all `readers` say the same of the written token, and falls as they differ.

        token      1 / (1 + gamma min(d / Q, cap)),  d the spread of log q_k(x) over the readers,
                   Q its 95 % quantile over the student's tokens of the batch on all ranks, at least 1e-6
        sequence   exp(-gamma d),  d the spread of the readers' mean log q_k over the student's tokens of a sequence

    The weight is never below `floor`.  The spread is the variance (divided by the number of readers) or the range.
    UniSD divides by the weights' sum: over="members".

    >>> tokens = some_tokens(teacher_logprobs_N=[-1.0, -1.0])
    >>> tokens = tokens.told("other", teacher_logprobs_N=torch.tensor([-1.0, -3.0]))
    >>> Agreement(("teacher", "other"), gamma=1.0)(tokens, Context())
    tensor([1.0000, 0.4872])
    """

    readers: tuple[str, ...]
    gamma: NotNegative = 0.001
    spread: Spread = "variance"
    per: Literal["token", "sequence"] = "token"
    floor: PositiveShare = 0.01
    cap: Positive = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.readers)) < max(len(self.readers), 2):
            raise ConfigError(
                f"the agreement of the readers {', '.join(self.readers) or 'of nobody'} was asked for. Name two or "
                "more, each once."
            )

    def own_asks(self, reader: str) -> dict[str, Needs]:
        return dict.fromkeys(self.readers, Needs.SAMPLED)

    @property
    def reach(self) -> Reach:
        return Reach.BATCH if self.per == "token" else Reach.SEQUENCE

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        said_KN = torch.stack([at_least_float32(tokens.of(name).teacher_logprobs_N) for name in self.readers])
        member_N = tokens.authors_N == Author.STUDENT
        if self.per == "token":
            weight_N = 1.0 / (1.0 + self.gamma * self._shares(spread_of(said_KN, self.spread), member_N, context))
            return weight_N.clamp_min(self.floor)
        num_S = torch.bincount(tokens.sequences_N[member_N], minlength=len(tokens.keys_S)).clamp_min(1)
        sum_KS = said_KN.new_zeros(len(said_KN), len(num_S))
        sum_KS.index_add_(1, tokens.sequences_N[member_N], said_KN[:, member_N])
        weight_S = (-self.gamma * spread_of(sum_KS / num_S, self.spread)).nan_to_num(nan=0.0).exp()
        return weight_S.clamp_min(self.floor)[tokens.sequences_N]

    def _shares(self, spread_N: Tensor, member_N: Tensor, context: Context) -> Tensor:
        """The spread in units of its quantile, at most `cap`."""
        everyone = context.world.gather(spread_N[member_N])
        everyone = everyone[everyone.isfinite()]
        unit = quantile(everyone, 0.95).clamp_min(1e-6) if len(everyone) else spread_N.new_ones(())
        return (spread_N / unit).clamp_max(self.cap)


@dataclass(frozen=True)
class ContrastiveHinge(TokenLoss):
    """max(0, margin + |s - g| - |s - b|): towards the reader, away from reader `bad`, until the margin is kept.

    s, g and b are the log-probabilities of the written token: the student's, which carries the gradient, the reader's,
    and that of a reader who was told something wrong.  A token of which both say the same has no gradient.

    >>> tokens = some_tokens(teacher_logprobs_N=[-1.0, -1.0])
    >>> tokens = tokens.told("bad", teacher_logprobs_N=torch.tensor([-3.0, -1.2]))
    >>> ContrastiveHinge(margin=0.1)(tokens, StudentView(logprobs_N=torch.tensor([-1.5, -1.5])), None)
    tensor([0.0000, 0.3000])
    """

    margin: NotNegative = 0.1
    bad: str = "bad"

    def own_asks(self, reader: str) -> dict[str, Needs]:
        return {reader: Needs.SAMPLED, self.bad: Needs.SAMPLED}

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        s_N = student.logprobs_N
        good_N, bad_N = (at_least_float32(x.teacher_logprobs_N) for x in (tokens, tokens.of(self.bad)))
        hinge_N = torch.relu(self.margin + (s_N - good_N).abs() - (s_N - bad_N).abs())
        return torch.where(good_N == bad_N, self.margin, hinge_N)
