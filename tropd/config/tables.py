"""Tables of a file as dataclasses, and dataclasses as tables.

read(cls, values, source)    unknown keys and wrong types are refused with their path and a suggestion
to_dict(value)               plain values, as TOML and JSON have them
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from tropd.base.names import Own
from tropd.errors import ConfigError, OutOfRange
from tropd.methods.base import NamedMethod

T = TypeVar("T")


def parts(cls: Any) -> Iterator[Any]:
    """A dataclass and all dataclasses in its fields."""
    yield cls
    for hint in get_type_hints(cls).values():
        for choice in _flat(hint):
            if dataclasses.is_dataclass(choice):
                yield from parts(choice)


def _flat(hint: Any) -> Iterator[Any]:
    """The classes inside a hint such as `tuple[A, ...] | None`."""
    if isinstance(hint, type):
        yield hint
    for inner in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _flat(inner)


@cache
def _adapter(root: type[T]) -> TypeAdapter[T]:
    for cls in set(parts(root)):
        cls.__pydantic_config__ = {"extra": "forbid"}
    return TypeAdapter(root)


def read(root: type[T], values: Mapping[str, Any], source: str, where: str = "") -> T:
    """A dataclass from nested values, such as parsed TOML.  Errors name their `source`, and the table by `where`."""
    try:
        return _adapter(root).validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(e, root, where) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def _explain(error: Any, root: type, where: str) -> str:
    """One of pydantic's errors about a `root`, in words."""
    path = [where] * bool(where) + [str(step) for step in error["loc"]]
    key, last = ".".join(path), path[-1] if path else ""
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(error["loc"][:-1], root)
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"unknown key {key!r}; {hint}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{key!r} is missing."
    refusal = error.get("ctx", {}).get("error")
    if isinstance(refusal, OutOfRange):
        within = key if error["loc"] or not where else ""
        return ".".join(filter(None, (within, refusal.message if within else str(refusal))))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key!r}: {message} (given: {error['input']!r})" if error["type"] != "value_error" else message


def _fields_at(loc: tuple[Any, ...], root: type) -> list[str]:
    """Field names of the dataclass at a path of an error."""
    cls: Any = root
    named = False  # the next step is a name that the user gave, such as that of a teacher
    for step in loc:
        if named:
            named = False
            continue
        hint = get_type_hints(cls).get(str(step))
        named = get_origin(hint) is dict
        found = [c for c in _flat(hint) if dataclasses.is_dataclass(c)]
        if not found:
            return []
        cls = found[0]
    return [f.name for f in dataclasses.fields(cls)]


def with_sections(root: type, values: Mapping[str, Any], flags: Sequence[str]) -> dict[str, Any]:
    """The values with an empty table for each section that they lack and a flag speaks of: `--student.lora.rank 4`
    needs no [student.lora] in the file."""
    values = copy.deepcopy(dict(values))
    for flag in flags:
        *steps, _ = flag.partition("=")[0].removeprefix("--").split(".")
        hint: Any = root
        table = values
        for step in steps if flag.startswith("--") else ():
            if get_origin(hint) is dict:  # the step is a name that the user gives, such as that of a teacher
                key, hint = step, get_args(hint)[1]
            else:
                classes = [choice for choice in _flat(hint) if dataclasses.is_dataclass(choice)]
                key = step.replace("-", "_")
                hint = get_type_hints(classes[0]).get(key) if len(classes) == 1 else None
            if hint is None or not any(map(dataclasses.is_dataclass, _flat(hint))) or key == "method":
                break
            if not isinstance(table := table.setdefault(key, {}), dict):
                break
    return values


def to_dict(value: Any) -> Any:
    """Plain values, without what is None: TOML has no null, and None is always the default.  An empty `plus` is left
    out as well: a method or a policy without additions is what it was."""
    if isinstance(value, NamedMethod | Own):
        return {"name": value.name, **to_dict(value.knobs)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_dict(x) for name, x in pairs if x is not None and not (name == "plus" and x == ())}
    if isinstance(value, Mapping):
        return {k: to_dict(x) for k, x in value.items() if x is not None}
    return [to_dict(x) for x in value] if isinstance(value, list | tuple) else value
