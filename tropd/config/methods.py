"""The method of a run: a table with its name and its knobs, and the object that they make.

Code of your own is imported only by `imported`: reading a file never runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import PlainValidator

from tropd.base.names import is_name, located, name_of, offered, shown
from tropd.base.reading import shortened
from tropd.config.models import GIVEN
from tropd.config.tables import read, to_dict
from tropd.errors import ConfigError
from tropd.methods import METHODS, Method, NamedMethod, check_name, find_method


def as_table(value: Any) -> NamedMethod:
    if isinstance(value, str):
        return NamedMethod(name=value)
    if not isinstance(value, dict) or not isinstance(value.get("name", ""), str):
        raise ValueError(f"method is {shortened(str(value))}, neither a name nor a table with a name and knobs.")
    return NamedMethod(name=value.get("name", "tropd"), knobs={k: x for k, x in value.items() if k != "name"})


MethodTable = Annotated[Method, PlainValidator(as_table)]
"""A method as a file has it: `read_method` makes the object."""


def read_method(method: Method, source: str, where: str = "method") -> Method:
    """The method behind a table, if it is one of METHODS.  One of your own stays a table."""
    if not isinstance(method, NamedMethod):
        return method
    cls = METHODS.get(method.name)
    if cls is not None:
        return read(cls, {"name": method.name, **on_defaults(cls, method.knobs)}, source, where)
    if not method.name.endswith(GIVEN):
        try:
            check_name(method.name)
        except ConfigError as refusal:
            raise ConfigError(f"{source}: {refusal}") from None
    return method


def imported(method: Method, where: str = "method") -> Method:
    """The method itself, where a table names code of your own: this runs that code."""
    if not isinstance(method, NamedMethod):
        return method
    if method.name.endswith(GIVEN):
        raise ConfigError(f"method {method.name} is in no file: give it again, train(run, method=...).")
    cls = find_method(method.name)
    made = read(cls, on_defaults(cls, method.knobs), f"method {shown(method.name)}", where)
    return _called(made, method.name)


def complete(method: Method, where: str = "method") -> Method:
    """Of code of your own, a table with every knob, which another process can read: this runs that code."""
    method = imported(method, where)
    if METHODS.get(method.name) is type(method):
        return method
    return NamedMethod(name=method.name, knobs={k: x for k, x in to_dict(method).items() if k != "name"})


def located_method(method: Method, folders: Sequence[Path] = ()) -> Method:
    """The method with its file by its whole path."""
    return replace(method, name=located(method.name, folders)) if isinstance(method, NamedMethod) else method


def named(method: Method) -> Method:
    """The method under the name by which a file finds it again."""
    if isinstance(method, NamedMethod) or METHODS.get(method.name) is type(method):
        return method
    if method.name in offered("methods") or (is_name(method.name) and method.name.endswith(type(method).__qualname__)):
        return method
    name = name_of(type(method))
    plain = name is not None and is_plain(to_dict(method))
    return _called(method, name if name and plain else f"{type(method).__name__} {GIVEN}")


def _called(method: Method, name: str) -> Method:
    method = copy.copy(method)
    object.__setattr__(method, "name", name)
    return method


def is_plain(value: Any) -> bool:
    """Whether TOML can hold it."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(x) for key, x in value.items())
    return all(map(is_plain, value)) if isinstance(value, list) else isinstance(value, str | int | float)


def on_defaults(cls: type, knobs: Mapping[str, Any]) -> dict[str, Any]:
    """Knobs with the class's own defaults under each table: `prefix.start = 0.5` keeps TrOPD's cosine."""
    if not any(isinstance(x, dict) for x in knobs.values()):
        return dict(knobs)
    return _merged(cls(), knobs)


def _merged(default: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(asked)
    for name, value in asked.items():
        own = getattr(default, name, None)
        if isinstance(value, dict) and is_dataclass(own):
            found[name] = {**to_dict(own), **_merged(own, value)}
    return found
