"""What a run file adds to a method: extras and rollout policies, described as plain data."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tropd.base.names import find, is_name, offered
from tropd.methods.extras import EXTRAS, Extra
from tropd.methods.ideas import Idea
from tropd.methods.knobs import Knob, knobs_of
from tropd.methods.policies import RolloutPolicy
from tropd.methods.stacked import POLICIES

Kind = Literal["extra", "policy"]

SECTIONS: dict[Kind, str] = {"extra": "[[method.plus]]", "policy": "[[rollout.plus]] or [rollout.policy]"}
"""Where a run file names them."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Everything that `tropd explain` says of an extra or a policy."""

    kind: Kind
    name: str
    title: str
    summary: str
    idea: Idea | None
    definition: str
    section: str
    knobs: tuple[Knob, ...]


def additions() -> list[Addition]:
    """All of tropd's own."""
    return [_described(name, cls) for name, cls in (*EXTRAS.items(), *POLICIES.items())]


def names_of_additions() -> list[str]:
    return [*EXTRAS, *POLICIES, *offered("extras"), *offered("policies")]


def additions_called(name: str) -> Iterator[Addition]:
    """The extra and the policy of this name, of which one of your own is imported."""
    classes: list[object] = [table[name] for table in (EXTRAS, POLICIES) if name in table]
    if is_name(name):
        classes.append(find(name, "method"))
    elif name in offered("extras"):
        classes.append(find(name, "extra"))
    elif name in offered("policies"):
        classes.append(find(name, "policy"))
    for cls in classes:
        if isinstance(cls, type) and issubclass(cls, Extra | RolloutPolicy):
            yield _described(name, cls)


def _described(name: str, cls: type[Extra] | type[RolloutPolicy]) -> Addition:
    definition = inspect.cleandoc(cls.__doc__ or "")
    if issubclass(cls, Extra):
        kind, summary = "extra", cls.summary
        idea: Idea | None = cls.idea
    else:
        reaches = cls.horizon is not RolloutPolicy.horizon
        kind, idea = "policy", "how far" if reaches else "who writes"
        summary = " ".join(definition.partition("\n\n")[0].split()).rstrip(".")
        summary = summary[:1].lower() + summary[1:]
    return Addition(
        kind=kind,
        name=name,
        title=cls.__name__,
        summary=summary,
        idea=idea,
        definition=definition.partition("\n>>>")[0].rstrip(),
        section=SECTIONS[kind],
        knobs=tuple(knobs_of(cls)),
    )
