"""SDFT: the student learns from demonstrations by teaching itself with them in front of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Share, Whole
from tropd.briefings.briefing import Briefing, WithColumn, WithDemonstrations, WithSystem
from tropd.briefings.follow import Ema, Frozen
from tropd.briefings.reader import Reader
from tropd.errors import ConfigError
from tropd.methods.base import Method
from tropd.objective.losses import ForwardKL, ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.places import PositionBelow
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class SDFT(Method):
    r"""Self-distillation fine-tuning: reverse KL over the whole vocabulary to a
    slow copy of the student that has read a demonstration c.

        KL(S || T),    S = pi(. | x, y_<t),    T = pi_ema(. | x, c, y_<t)
        pi_ema <- decay pi_ema + (1 - decay) pi    after every step, of weights
    """

    name: Literal["sdft"] = "sdft"
    column: str = "solution"
    """The data set's column with the demonstration that the teacher is told (paper: an expert's answer)."""
    demonstrations: Whole = 0
    """Tell so many solved problems of the data set instead, the nearest by their words; 0 tells the column of the
    prompt itself (paper). At least 0."""
    system: str | None = None
    """Tell this system prompt instead, the same for all prompts, as context distillation does (arXiv:2112.00861);
    left out, the teacher is told a demonstration (paper)."""
    divergence: Literal["reverse_kl", "forward_kl"] = "reverse_kl"
    """Which divergence (paper: reverse KL; the released code's default is forward KL)."""
    decay: Share = 0.99
    """How much of itself the teacher keeps at each step (code: 0.99); 1 leaves it the student before training. In
    [0, 1]."""
    skip: Whole = 0
    """First tokens of each response that teach nothing, where a teacher speaks of its demonstration (the code leaves
    out 3; the paper's objective none). At least 0."""

    paper = "2601.19897"
    summary = "reverse KL over the whole vocabulary to the student's average, told a demonstration"
    idea = "what teaches"
    readings = (
        "The paper derives reverse KL, and the released code computes forward KL and leaves out the first 3 tokens: "
        "divergence = 'forward_kl', skip = 3.",
        "The paper's demonstration answers the prompt itself: column. Other solved problems, demonstrations = 3, and "
        "one rule for all prompts, system, are the older forms of context distillation.",
    )

    @property
    def objective(self) -> Objective:
        where = STUDENT & ~PositionBelow(self.skip) if self.skip else STUDENT
        return Objective(Term(self.divergence, where, ReverseKL() if self.divergence == "reverse_kl" else ForwardKL()))

    @property
    def readers(self) -> Mapping[str, Reader]:
        follow = Frozen() if self.decay == 1 else Ema(decay=self.decay)
        return {"teacher": Reader(model="start", briefing=self._briefing, follow=follow)}

    @property
    def _briefing(self) -> Briefing:
        if self.system is not None and self.demonstrations:
            raise ConfigError("sdft has a system prompt and demonstrations to tell its teacher. Choose one of the two.")
        if self.system is not None:
            return WithSystem(text=self.system)
        if self.demonstrations:
            return WithDemonstrations(solution=self.column, count=self.demonstrations)
        return WithColumn(column=self.column)
