"""A run as a file: TOML and flags in, complete TOML out.

load(path, flags) -> Run     unknown keys and wrong types are refused with their path and a suggestion
dump(run) -> str             the whole run as TOML, defaults included
fingerprint(run) -> str      names it
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from tyro.conf import AvoidSubcommands

from tropd.base.reading import check_path, read_toml
from tropd.config.flags import read_flags
from tropd.config.run import Run
from tropd.errors import ConfigError, OutOfRange
from tropd.methods import METHODS


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
def _adapter() -> TypeAdapter[Run]:
    for cls in set(parts(Run)):
        cls.__pydantic_config__ = {"extra": "forbid"}
    return TypeAdapter(Run)


def build(values: dict[str, Any], source: str) -> Run:
    """A run from nested values, such as parsed TOML.  `source` names it in errors."""
    method = values.get("method")
    if isinstance(method, str):
        values = {**values, "method": {"name": method}}
    elif isinstance(method, dict) and "name" not in method:
        values = {**values, "method": {"name": "tropd", **method}}
    if isinstance(values.get("method"), dict):
        values = {**values, "method": on_defaults(values["method"])}
    try:
        return _adapter().validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [explain_error(e, Run) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def on_defaults(method: dict[str, Any]) -> dict[str, Any]:
    """A method's table, with its own defaults under each table in it: `prefix.start = 0.5` keeps TrOPD's cosine."""
    cls = METHODS.get(str(method.get("name")))
    return method if cls is None else _merged(cls(), method)


def _merged(default: Any, asked: dict[str, Any]) -> dict[str, Any]:
    found = dict(asked)
    for name, value in asked.items():
        own = getattr(default, name, None)
        if isinstance(value, dict) and dataclasses.is_dataclass(own):
            found[name] = {**to_dict(own), **_merged(own, value)}
    return found


def load(path: Path, flags: Sequence[str] = ()) -> Run:
    """A run from a TOML file, changed by flags such as `--method.top-k 32`."""
    check_path(path, "the run file")
    if not os.path.lexists(path):
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        there = f" TOML files there: {', '.join(near)}." if near else ""
        raise ConfigError(f"there is no file {path}.{there}")
    values = read_toml(path)
    named, flags = _method_flag(flags)
    run = build(values, str(path))
    if named not in (None, run.method.name):
        run = build({**values, "method": {"name": named}}, f"--method {named}")
    if not flags:
        return run
    return read_flags(AvoidSubcommands[Run], flags, "tropd train RUN.toml", default=run)


def _method_flag(flags: Sequence[str]) -> tuple[str | None, list[str]]:
    """The method that `--method NAME` or `--method.name NAME` asks for, and the other flags.

    Another method than the file's begins with its own defaults: the file's knobs belong to the file's method.
    """
    named, rest, left = None, [], list(flags)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if flag not in ("--method", "--method.name"):
            rest.append(flag + equals + value)
        elif equals or left:
            named = value if equals else left.pop(0)
        else:
            raise ConfigError(f"{flag} wants the name of a method: {', '.join(METHODS)}.")
    return named, rest


def explain_error(error: Any, root: type) -> str:
    """One of pydantic's errors about a `root`, in words."""
    loc = error["loc"]
    tags = range(1, len(loc) - (error["type"] == "unexpected_keyword_argument"))  # the method's name, said by pydantic
    path = [str(x) for place, x in enumerate(loc) if not (place in tags and x in METHODS)]
    where, last = ".".join(path), path[-1] if path else ""
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(error["loc"][:-1], root)
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        name = str(error["input"].get("name"))
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f" did you mean {near[0]!r}?" if near else ""
        return f"there is no method {name!r};{hint} known: {', '.join(METHODS)}."
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where!r} is missing."
    refusal = error.get("ctx", {}).get("error")
    if isinstance(refusal, OutOfRange):
        return ".".join(filter(None, (where, refusal.message)))
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where!r}: {message} (given: {error['input']!r})" if error["type"] != "value_error" else message


def _fields_at(loc: tuple[Any, ...], root: type) -> list[str]:
    """Field names of the dataclass at a path of an error."""
    cls: Any = root
    named = False  # the next step is a name that the user gave, such as that of a teacher
    for step in loc:
        if named:
            named = False
            continue
        if step in METHODS:
            cls = METHODS[step]
            continue
        hint = get_type_hints(cls).get(str(step))
        named = get_origin(hint) is dict
        found = [c for c in _flat(hint) if dataclasses.is_dataclass(c)]
        if step == "method" and cls is Run:
            continue
        if not found:
            return []
        cls = found[0]
    return [f.name for f in dataclasses.fields(cls)]


def to_dict(value: Any) -> Any:
    """Plain values, without what is None: TOML has no null, and None is always the default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_dict(x) for name, x in pairs if x is not None}
    if isinstance(value, Mapping):
        return {k: to_dict(x) for k, x in value.items() if x is not None}
    return [to_dict(x) for x in value] if isinstance(value, list | tuple) else value


def dump(run: Run) -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(run))


def fingerprint(run: Run) -> str:
    """Twelve characters that differ when anything that shapes the result does: not where servers are, how long they are
    waited for, what is kept and what is watched."""
    values = to_dict(run)
    for name in ("output", "trackers", "parallel", "checkpoint", "alarms"):
        values.pop(name, None)
    for name in ("weights_folder", "servers_sleep"):
        values["rollout"].pop(name, None)
    for served in (values["rollout"], values["teacher"], *values["teachers"].values()):
        served["servers"] = bool(served["servers"])
        served["server"] = {name: served["server"].get(name) for name in ("kind", "model", "text")}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
