"""What a method is: a frozen dataclass whose fields are its knobs and whose two properties are its definition.

Its docstring holds the equation; the docstring under each field says what the knob does and where the default comes
from: (paper), (code), (TrOPD's benchmark) or [inferred].  `readings` lists what the sources leave open and what is
taken here.  `tropd explain` prints all of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Annotated, Any, ClassVar, NoReturn

from tyro.conf import Fixed, Suppress

from tropd.base.ranges import Ranged
from tropd.briefings.reader import Reader
from tropd.errors import ConfigError, MethodWarning
from tropd.methods.extras import Extra
from tropd.methods.ideas import Idea
from tropd.methods.policies import OnPolicy, RolloutPolicy
from tropd.objective.evidence import Needs
from tropd.objective.objective import Objective
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Method(Ranged):
    """An objective and a rollout policy.  To change a method, compose another one; nothing concrete is overridden."""

    section = "method"

    name: str = ""
    """By which a run file finds it.  tropd gives a method of your own its name."""
    plus: Annotated[tuple[Extra, ...], Fixed, Suppress] = ()
    """Changes to its objective, one after another (`tropd.methods.extras`)."""

    paper: ClassVar[str] = ""
    """arXiv id or address."""
    summary: ClassVar[str] = ""
    """One line for `tropd methods`."""
    idea: ClassVar[Idea | None] = None
    """Under which it is listed."""
    readings: ClassVar[tuple[str, ...]] = ()
    """What the sources leave open, and the reading taken."""
    zero_at_teacher: ClassVar[bool] = True
    """Whether a student that equals its teacher gets exactly no signal."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if isinstance(own := vars(cls).get("objective"), property) and own.fget is not None:
            cls.objective = property(_with_extras(cls, own.fget))  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if odd := [extra for extra in self.plus if not isinstance(extra, Extra)]:
            raise ConfigError(f"method.plus holds {odd[0]!r}. Give objects of an Extra, such as RandomMask(share=0.5).")
        objective, *_ = self.objective, self.rollout, self.sampling, self.readers  # refuse now what its parts refuse
        if not isinstance(objective, Objective):
            raise ConfigError(f"method {type(self).__name__}: its objective is {objective!r}. Give an Objective.")

    @property
    def objective(self) -> Objective:
        raise NotImplementedError(f"{type(self).__name__} has no objective: a method defines `objective`.")

    @property
    def rollout(self) -> RolloutPolicy:
        return OnPolicy()

    @property
    def sampling(self) -> Sampling | None:
        """How its rollouts are drawn, where the method prescribes it."""
        return None

    @property
    def readers(self) -> Mapping[str, Reader]:
        """Who reads the responses, where the method prescribes it; a run's [teacher] and [readers.NAME] come first."""
        return {}

    @property
    def needs(self) -> Needs:
        return self.objective.needs

    def objections(self, sampling: Sampling) -> list[str]:
        """What is wrong with running this method on rollouts drawn like that."""
        return []


def _with_extras(cls: type[Method], own: Callable[[Any], Objective]) -> Callable[[Any], Objective]:
    """The objective as this class defines it, with the extras of the object: once, where a subclass builds on it."""

    @wraps(own)
    def objective(self: Method) -> Objective:
        found = own(self)
        if next(c for c in type(self).__mro__ if "objective" in vars(c)) is cls:
            for extra in self.plus:
                found = extra.apply(found)
        return found

    return objective


@dataclass(frozen=True, kw_only=True)
class NamedMethod(Method):
    """A method as a run file has it: a name and knobs.  Code of your own is one until it is imported."""

    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        pass

    @property
    def objective(self) -> Objective:
        self._refuse()

    @property
    def rollout(self) -> RolloutPolicy:
        self._refuse()

    @property
    def sampling(self) -> Sampling | None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(f"method {self.name!r} is not imported here. Read it, then add --trust-code.")


def warn(text: str) -> None:
    """A configuration that is known to work badly: say why, at configuration time."""
    warnings.warn(text, MethodWarning, stacklevel=4)
