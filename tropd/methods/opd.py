"""OPD: plain on-policy distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Positive, Share
from tropd.errors import ConfigError
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient, SampledReverseKL
from tropd.objective.objective import Objective
from tropd.objective.rewards import FutureSum, LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


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
    reward_logprobs: Literal["trainer", "sampler"] = "trainer"
    """Whose log pi_S the reward has: the model that is trained, whose KL is minimised [inferred], or the engine that
    drew the token (code)."""
    ratio_cap: Positive | None = None
    """Truncate the importance ratio from above (code: none). Above 0."""
    ratio_clip: Positive | None = None
    """PPO's clip of the importance ratio (code: none; verl: 0.2).  It acts from the second update of a batch on. Above
    0."""

    paper = "https://thinkingmachines.ai/blog/on-policy-distillation"
    summary = "every token rewarded with log pi_T - log pi_S"
    idea = "whose distribution"
    readings = (
        "Tinker's code takes log pi_S in the reward from the sampler. Sampler and trainer differ by about 1e-2 nats in "
        "half precision, and that difference is noise in the reward, so the trainer's is the default here; "
        "reward_logprobs = 'sampler' is Tinker's.",
    )

    def __post_init__(self) -> None:
        if self.estimator == "k3":
            raise ConfigError(
                "estimator = 'k3' as a loss has the gradient of forward KL, KL(teacher || student), although its value "
                "estimates reverse KL. Use 'policy_gradient' or 'k2' for reverse KL, or method 'full_fkl'."
            )
        if self.estimator == "k2" and self.discount > 0:
            raise ConfigError("estimator = 'k2' is a loss at one token and knows no discount: use 'policy_gradient'.")
        if self.estimator == "k2" and self.reward_logprobs == "sampler":
            raise ConfigError("estimator = 'k2' is a loss, without a reward: leave out reward_logprobs.")
        super().__post_init__()

    @property
    def objective(self) -> Objective:
        if self.estimator == "k2":
            return Objective(Term("reverse_kl", STUDENT, SampledReverseKL()))
        ratio = LogRatio(against="behavior" if self.reward_logprobs == "sampler" else "student")
        reward = chain(ratio, FutureSum(self.discount)) if self.discount > 0 else ratio
        loss = PolicyGradient(reward, clip=self.ratio_clip, cap=self.ratio_cap)
        return Objective(Term("reverse_kl", STUDENT, loss))
