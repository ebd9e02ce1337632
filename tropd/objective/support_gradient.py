"""A policy gradient over several tokens of a position, drawn or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.errors import ConfigError
from tropd.objective.divergence import DivergenceLoss


@dataclass(frozen=True)
class SupportGradient(DivergenceLoss):
    """sum_{v in A} w(v) (log S(v) - log T(v)), whose gradient is that of a policy that drew each token with weight w.

    Gradient: - sum_A w(v) (log T(v) - log S(v)) grad log S(v); w is S, T or 1.  With w = S it
    is the gradient of `ReverseKL(outside="stop_gradient")`.  Nothing is left where both models agree on the support.

    >>> teacher, student = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.4, 0.4, 0.2]])
    >>> view = StudentView(logprobs_N=student[:, 0].log(), full_logprobs_NV=student.log())
    >>> SupportGradient(weight="teacher")(some_tokens(teacher_full_logprobs_NV=teacher.log()), view, None)
    tensor([-0.1838])
    """

    weight: Literal["student", "teacher", "none"] = "student"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside != "ignore":
            raise ConfigError(f"outside={self.outside!r} corrects a divergence; a support's gradient has 'ignore'.")

    def entries(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        fixed = log_s.detach()
        weight = {"student": fixed.exp(), "teacher": log_t.exp(), "none": torch.ones_like(fixed)}[self.weight]
        counts = (weight > 0) & ~((fixed == -torch.inf) & (log_t == -torch.inf))
        cost = weight * (torch.where(counts, fixed, 0.0) - torch.where(counts, log_t, 0.0))
        step = (torch.where(counts, log_s, 0.0) - torch.where(counts, fixed, 0.0)).exp()
        return torch.where(counts, cost * step, 0.0)
