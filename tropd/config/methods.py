"""The method of a run: a table with its name and its knobs, and the object that they make.

Code of your own is imported only by `imported`: reading a file never runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import PlainValidator

from tropd.base.names import Own, find, is_name, located, name_of, offered, shown
from tropd.base.reading import shortened
from tropd.config.models import GIVEN
from tropd.config.tables import read, to_dict
from tropd.errors import ConfigError
from tropd.methods import METHODS, Method, NamedMethod, check_name, find_method
from tropd.methods.extras import EXTRAS, Extra

T = TypeVar("T", bound=Method | Extra)


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
    cls, extras = METHODS.get(method.name), _extras(method, source, where)
    if cls is not None:
        return _made(cls, method, source, where) if all(extra.name in EXTRAS for extra in extras) else method
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
    return _called(_made(cls, method, f"method {shown(method.name)}", where), method.name)


def _made(cls: type[Method], method: NamedMethod, source: str, where: str) -> Method:
    """The object of a table; extras of your own are imported."""
    knobs = {name: x for name, x in method.knobs.items() if name != "plus"}
    made = read(cls, on_defaults(cls, knobs), source, where)
    extras = tuple(_extra(table, source, f"{where}.plus") for table in _extras(method, source, where))
    return replace(made, plus=extras) if extras else made


def _extras(method: NamedMethod, source: str, where: str) -> list[Own]:
    """The extras of a table, by name."""
    asked = method.knobs.get("plus", ())
    try:
        if not isinstance(asked, list | tuple):
            raise ConfigError(f"{where}.plus is {shortened(repr(asked))}. Give a list of names or tables.")
        return [Own.read(value, "extra", f"{where}.plus", EXTRAS) for value in asked]
    except ConfigError as refusal:
        raise ConfigError(f"{source}: {refusal}") from None


def _extra(table: Own, source: str, where: str) -> Extra:
    cls = EXTRAS.get(table.name) or find(table.name, "extra")
    if not isinstance(cls, type) or not issubclass(cls, Extra) or not is_dataclass(cls):
        raise ConfigError(
            f"extra '{shown(table.name)}' is no dataclass that inherits from tropd.Extra. Make it one: "
            "@dataclass(frozen=True, kw_only=True)."
        )
    return _called(read(cls, table.knobs, source, where), table.name)


def complete(method: Method, where: str = "method") -> Method:
    """Of code of your own, a table with every knob, which another process can read: this runs that code."""
    method = imported(method, where)
    if METHODS.get(method.name) is type(method) and all(extra.name in EXTRAS for extra in method.plus):
        return method
    return NamedMethod(name=method.name, knobs={k: x for k, x in to_dict(method).items() if k != "name"})


def located_method(method: Method, folders: Sequence[Path] = ()) -> Method:
    """The method with its file by its whole path."""
    if not isinstance(method, NamedMethod):
        return method
    knobs = dict(method.knobs)
    if plus := _extras(method, "the run", "method"):
        knobs["plus"] = [to_dict(extra.located(folders)) for extra in plus]
    return replace(method, name=located(method.name, folders), knobs=knobs)


def named(method: Method) -> Method:
    """The method under the name by which a file finds it again."""
    if isinstance(method, NamedMethod) or METHODS.get(method.name) is type(method):
        return method
    if method.name in offered("methods") or (is_name(method.name) and method.name.endswith(type(method).__qualname__)):
        return method
    name = name_of(type(method))
    plain = name is not None and is_plain(to_dict(method))
    return _called(method, name if name and plain else f"{type(method).__name__} {GIVEN}")


def _called(made: T, name: str) -> T:
    made = copy.copy(made)
    object.__setattr__(made, "name", name)
    return made


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
