"""TOP-D: the teacher replaced by a mixture with the student.  Not TrOPD, despite the name it got elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import PositiveShare
from tropd.methods.base import Method
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.rewards import LogRatio, PlusFutureMean, ProximalTeacher, Standardise, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Reward, Term


@dataclass(frozen=True, kw_only=True)
class TOPD(Method):
    r"""TOP-D: the teacher is replaced by a mixture with the student.

    alpha = 1 is OPD.

        reward  log(alpha pi_T(x) / pi_S(x) + 1 - alpha)
                never below log(1 - alpha)
    """

    name: Literal["topd"] = "topd"
    alpha: PositiveShare = 0.2
    """Share of the teacher in the proximal teacher (NeMo-RL's example: 0.2). In (0, 1]."""
    credit: Literal["token", "future_mean"] = "token"
    """The token's own reward, or plus the mean of the later ones (prime-rl)."""
    normalise: Literal["none", "baseline", "group"] = "none"
    """Subtract the batch's mean (NeMo-RL), or standardise over each prompt's rollouts (prime-rl)."""

    paper = "2607.04751"
    summary = "reward against a mixture of teacher and student, bounded below"
    idea = "whose distribution"
    readings = ("NeMo-RL's pull request calls this method 'tropd'; here that name belongs to arXiv 2606.01249.",)

    @property
    def objective(self) -> Objective:
        links: list[Reward] = [LogRatio(), ProximalTeacher(self.alpha)]
        if self.credit == "future_mean":
            links.append(PlusFutureMean())
        if self.normalise != "none":
            grouped = self.normalise == "group"
            links.append(Standardise("group" if grouped else "batch", divide=grouped))
        return Objective(Term("reverse_kl", STUDENT, PolicyGradient(chain(*links))))
