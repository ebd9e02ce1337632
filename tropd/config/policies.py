"""The rollout policy of a run, where the run file names one beside its method.

A policy of tropd is made when the file is read, one of your own when `imported` is called.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from typing import Any

from tropd.base.names import Own, as_base, find, name_of, shown
from tropd.base.reading import shortened
from tropd.config.methods import is_plain, on_defaults
from tropd.config.tables import read, to_dict
from tropd.errors import ConfigError
from tropd.methods.policies import RolloutPolicy
from tropd.methods.stacked import POLICIES

WHERE = "rollout.policy"


@dataclass(frozen=True, kw_only=True)
class NamedPolicy(Own):
    """A policy as a run file has it, and the object once it is made."""

    made: RolloutPolicy | None = field(default=None, compare=False, repr=False)

    @property
    def policy(self) -> RolloutPolicy:
        if self.made is None:
            raise ConfigError(f"{WHERE} {self.name!r} is not imported here. Read it, then add --trust-code.")
        return self.made


def read_policy(value: Any, where: str = WHERE) -> NamedPolicy | None:
    """From a name, a table, or a policy that was made in Python."""
    if value is None or isinstance(value, NamedPolicy):
        return value
    if isinstance(value, RolloutPolicy):
        return _named(value)
    named = NamedPolicy.read(value, "policy", where, POLICIES)
    return _with(named.name, _made(POLICIES[named.name], named, where)) if named.name in POLICIES else named


def read_policies(values: Any) -> tuple[NamedPolicy, ...]:
    """Several, of which one name alone is no list."""
    if not isinstance(values, list | tuple):
        raise ConfigError(f"rollout.plus is {shortened(repr(values))}. Give a list of policies.")
    return tuple(policy for value in values if (policy := read_policy(value, "rollout.plus")) is not None)


def imported_policy(named: NamedPolicy | None) -> NamedPolicy | None:
    """The same with its object: this runs the code that it names."""
    if named is None or named.made is not None:
        return named
    cls = find(named.name, "policy")
    if not isinstance(cls, type) or not issubclass(cls, RolloutPolicy) or not is_dataclass(cls):
        raise ConfigError(
            f"policy '{shown(named.name)}' is no dataclass that inherits from {as_base(RolloutPolicy)}. Make it one: "
            "@dataclass(frozen=True, kw_only=True)."
        )
    return _with(named.name, _made(cls, named))


def writes_alone(policy: RolloutPolicy, problem: str) -> str:
    """Why a policy cannot draw its tokens from both models."""
    return (
        f"{type(policy).__name__} draws each token with student and teacher together, which takes two models in this "
        f"process, but {problem}. Set teacher.path to a model, without servers, a bridge or a direction, leave out "
        "rollout.servers and rollout.engine, or use another policy."
    )


def _made(cls: type[RolloutPolicy], named: Own, where: str = WHERE) -> RolloutPolicy:
    return read(cls, on_defaults(cls, named.knobs), f"policy {shown(named.name)}", where)


def _with(name: str, policy: RolloutPolicy) -> NamedPolicy:
    """Every knob is kept, so that the run stays the same when a default changes."""
    knobs: Mapping[str, Any] = to_dict(policy)
    return NamedPolicy(name=name, knobs=knobs, made=policy)


def _named(policy: RolloutPolicy) -> NamedPolicy:
    """One that was made in Python under the name by which a file finds it again."""
    names = {cls: name for name, cls in POLICIES.items()}
    name = names.get(type(policy)) or name_of(type(policy))
    if name is None or not is_dataclass(policy) or not is_plain(to_dict(policy)):
        raise ConfigError(
            f"{WHERE} is a {type(policy).__name__} that no run file can hold. Make it a dataclass in a file of yours, "
            "with knobs that TOML has."
        )
    return _with(name, policy)
