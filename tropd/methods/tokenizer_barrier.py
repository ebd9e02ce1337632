"""Breaking the Tokenizer Barrier: OPD from a teacher with a tokenizer of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Positive
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class TokenizerBarrier(Method):
    r"""Distillation across tokenizers: OPD's reward, where the bridge of the run
    brings the teacher's log-probabilities back to the student's tokens.

        chunk   a shortest piece of text that both tokenizers cut at both ends
                L_T, L_S its log-probabilities to teacher and student
        reward  a_t = (L_T / L_S - 1) log pi_S(x_t)
        loss    -rho_t a_t, PPO-clipped to [1 - ratio_clip, 1 + ratio_clip_high]
    """

    name: Literal["tokenizer_barrier"] = "tokenizer_barrier"
    ratio_clip: Positive = 0.2
    """PPO's clip of the importance ratio from below (code: 0.2).  Both act from the second update of a batch on. Above
    0."""
    ratio_clip_high: Positive = 0.28
    """The same from above (code: 0.28). Above 0."""

    paper = "2606.09456"
    idea = "whose distribution"
    summary = "OPD across tokenizers: a section [teacher.bridge] brings the teacher's scores back"
    readings = (
        "The bridge belongs to the teacher, not to the method: an empty section [teacher.bridge] has the paper's "
        "settings, and any method of sampled tokens works across it. Without that section this is OPD with PPO's clip.",
        "A chunk that is too long, or that the teacher cannot read, has the advantage 0 in the code, and so counts in "
        "the mean [inferred]; here its tokens count nowhere.",
    )

    @property
    def objective(self) -> Objective:
        loss = PolicyGradient(LogRatio(), clip=self.ratio_clip, clip_high=self.ratio_clip_high)
        return Objective(Term("reverse_kl", STUDENT, loss))
