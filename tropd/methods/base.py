"""What a method is: a frozen dataclass whose fields are its knobs and whose two properties are its definition.

Its docstring holds the equation; the docstring under each field says what the knob does and where the default comes
from: (paper), (code), (TrOPD's benchmark) or [inferred].  `readings` lists what the sources leave open and what is
taken here.  `tropd explain` prints all of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar

from tropd.base.ranges import Ranged
from tropd.errors import MethodWarning
from tropd.methods.policies import OnPolicy, RolloutPolicy
from tropd.objective.evidence import Needs
from tropd.objective.objective import Objective
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Method(Ranged):
    """An objective and a rollout policy.  To change a method, compose another one; nothing concrete is overridden."""

    section = "method"

    paper: ClassVar[str]
    """arXiv id or address."""
    summary: ClassVar[str]
    """One line for `tropd methods`."""
    readings: ClassVar[tuple[str, ...]] = ()
    """What the sources leave open, and the reading taken."""
    zero_at_teacher: ClassVar[bool] = True
    """Whether a student that equals its teacher gets exactly no signal."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.objective, self.rollout, self.sampling  # refuse now what its parts refuse

    @property
    def objective(self) -> Objective:
        raise NotImplementedError

    @property
    def rollout(self) -> RolloutPolicy:
        return OnPolicy()

    @property
    def sampling(self) -> Sampling | None:
        """How its rollouts are drawn, where the method prescribes it."""
        return None

    @property
    def needs(self) -> Needs:
        return self.objective.needs

    def objections(self, sampling: Sampling) -> list[str]:
        """What is wrong with running this method on rollouts drawn like that."""
        return []


def warn(text: str) -> None:
    """A configuration that is known to work badly: say why, at configuration time."""
    warnings.warn(text, MethodWarning, stacklevel=4)
