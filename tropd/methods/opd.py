"""OPD: plain on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.errors import ConfigError
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient, SampledReverseKL
from tropd.objective.objective import Objective
from tropd.objective.rewards import FutureSum, LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term
from tropd.ranges import Positive, Share


@dataclass(frozen=True, kw_only=True)
class OPD(Method):
    r"""On-policy distillation (Thinking Machines).

    The gradient is that of KL(student || teacher) at each visited state.

        reward  a_t = log pi_T(x_t) - log pi_S(x_t)
        loss    -rho_t sg[sum_{i >= t} discount^(i - t) a_i]
                rho = pi_S / (policy that sampled x)
    """

    name: Literal["opd"] = "opd"
    discount: Share = 0.0
    """How much later rewards count for a token; 0 is the token alone (code: 0). In [0, 1]."""
    estimator: Literal["policy_gradient", "k2", "k3"] = "policy_gradient"
    """policy_gradient, or k2 = (log pi_S - log pi_T)^2 / 2 as a loss: the same expected gradient.  k3 is refused."""
    ratio_cap: Positive | None = None
    """Truncate the importance ratio from above (code: none). Above 0."""
    ratio_clip: Positive | None = None
    """PPO's clip of the importance ratio (code: none; verl: 0.2). Above 0."""

    paper = "https://thinkingmachines.ai/blog/on-policy-distillation"
    summary = "every token rewarded with log pi_T - log pi_S"

    def __post_init__(self) -> None:
        if self.estimator == "k3":
            raise ConfigError(
                "estimator = 'k3' as a loss has the gradient of forward KL, KL(teacher || student), although its value "
                "estimates reverse KL. Use 'policy_gradient' or 'k2' for reverse KL, or method 'full_fkl'."
            )
        if self.estimator == "k2" and self.discount > 0:
            raise ConfigError("estimator = 'k2' is a loss at one token and knows no discount: use 'policy_gradient'.")
        super().__post_init__()

    @property
    def objective(self) -> Objective:
        if self.estimator == "k2":
            return Objective(Term("reverse_kl", STUDENT, SampledReverseKL()))
        reward = chain(LogRatio(), FutureSum(self.discount)) if self.discount > 0 else LogRatio()
        loss = PolicyGradient(reward, clip=self.ratio_clip, cap=self.ratio_cap)
        return Objective(Term("reverse_kl", STUDENT, loss))
