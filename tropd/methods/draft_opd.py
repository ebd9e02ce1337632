"""Draft-OPD: distillation of a draft model for speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, NotNegative, Share
from tropd.methods.base import Method
from tropd.objective.acceptance import Accepted, Rejected
from tropd.objective.losses import ForwardKL, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class DraftOPD(Method):
    r"""Forward KL where the teacher would accept the student's draft, reverse KL
    after the first rejection.

        accepted  mean KL(pi_T || pi_S)
        rejected  weight sum_k d^k KL(pi_S || pi_T) / sum_k d^k,  d: discount
        A token is accepted if from the start of its block of 16 on both models
        have the same likeliest token; k counts from its first rejection.
    """

    name: Literal["draft_opd"] = "draft_opd"
    block: Count = 16
    """Tokens of a draft (reproduction: 16). At least 1."""
    discount: Share = 0.8
    """How much less each token after a rejection counts (reproduction: 0.8). In [0, 1]."""
    weight: NotNegative = 1.0
    """Of the rejected tokens' part (the paper's lambda; 1 [inferred]). At least 0."""

    paper = "2605.29343"
    summary = "forward KL on tokens of a draft that the teacher accepts, reverse KL after a rejection"
    idea = "which tokens"
    readings = (
        "The loss alone is here: the student is the draft model and writes its own text, which the teacher reads. The "
        "paper's draft head and its server are not.",
        "Both sums run over the whole batch, not over each block.",
    )

    @property
    def objective(self) -> Objective:
        accepted, rejected = Accepted(self.block), Rejected(self.block, self.discount)
        return Objective(
            Term("accepted", STUDENT & accepted, ForwardKL(), over="members"),
            Term("rejected", STUDENT & rejected, ReverseKL(), weight=self.weight, over="members"),
        )
