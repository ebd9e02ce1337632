"""Flags on top of a default, by tyro, with tropd's own refusals as tropd says them: one sentence, not a box.  Knobs of
code of your own are read here, for that code may not be imported."""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

import tyro

from tropd.errors import ConfigError, OutOfRange, TropdError
from tropd.methods import METHODS


def read_flags(target: Any, flags: Sequence[str], prog: str, **how: Any) -> Any:
    """What tyro makes of the flags: `default` as they change it, or a function called with them."""
    boxed = StringIO()
    try:
        with redirect_stderr(boxed):
            return tyro.cli(target, args=list(flags), prog=prog, **how)
    except SystemExit as stop:
        if not stop.code:
            raise
        if refusal := _refusal_behind(stop):
            raise refusal from None
        sys.stderr.write(boxed.getvalue())
        named = dict.fromkeys(flag for flag in flags if flag.startswith("--") and flag in boxed.getvalue())
        said = f"flags above are not understood{': ' * bool(named)}{', '.join(named)}"
        raise ConfigError(f"the {said}. `{prog} --help` lists those there are.") from None


def _refusal_behind(error: BaseException | None) -> TropdError | None:
    """What tropd said, with the whole path of the flag, which tyro knows."""
    where = ""
    while error is not None and not isinstance(error, TropdError):
        asked = getattr(error, "arg", "")
        where = asked.replace("-", "_") if isinstance(asked, str) else where
        error = error.__cause__ or error.__context__
    return OutOfRange(where, error.message) if where and isinstance(error, OutOfRange) else error


def method_flag(flags: Sequence[str]) -> tuple[str | None, list[str]]:
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


def take(flags: Sequence[str], pattern: str) -> tuple[dict[str, Any], list[str]]:
    """The values of the flags whose names match, and the other flags.  A value that is JSON is read as JSON."""
    taken: dict[str, Any] = {}
    rest, left = [], list(flags)
    while left:
        flag, equals, value = left.pop(0).partition("=")
        if not re.fullmatch(pattern, flag.removeprefix("--")) or not flag.startswith("--"):
            rest.append(flag + equals + value)
            continue
        if not equals:
            if not left:
                raise ConfigError(f"{flag} wants a value.")
            value = left.pop(0)
        taken[flag.removeprefix("--")] = _read_value(value)
    return taken, rest


def _read_value(text: str) -> Any:
    try:
        return json.loads(text.lower() if text in ("True", "False") else text)
    except ValueError:
        return text


def with_knobs(knobs: Mapping[str, Any], flags: Mapping[str, Any], table: str) -> dict[str, Any]:
    """Knobs as flags change them: `method.prefix.top-k` is the knob `top_k` of the table `prefix`."""
    changed = copy.deepcopy(dict(knobs))
    for flag, value in flags.items():
        *path, last = flag.removeprefix(table + ".").replace("-", "_").split(".")
        inner = changed
        for step in path:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--{flag} sets a part of {step}, which is no table.")
        inner[last] = value
    return changed


_TABLE = r"(?:(?:teacher|(?:teachers|readers)\..+)\.(?:briefing|follow)|rollout\.(?:engine|policy))"
"""Of what a flag can name; its knobs are known only to the code behind the name."""


def with_named(values: Mapping[str, Any], flags: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of a run file as flags such as `--teacher.briefing.kind system` and `--rollout.policy mixture` change
    them, and the other flags.

    Another kind begins with its own defaults: the file's knobs belong to the file's kind.
    """
    asked, rest = take(flags, rf"{_TABLE}(\..+)?")
    changed = copy.deepcopy(dict(values))
    for flag, value in sorted(asked.items(), key=lambda pair: bool(_knob_of(pair[0])[1])):
        place, knob = _knob_of(flag)
        whose, _, name = place.rpartition(".")
        table = changed
        for step in whose.split(".", 1):
            table = table.setdefault(step, {})
        before, key = table.get(name, {}), _key_of(place)
        kept = {key: before} if isinstance(before, str) else before
        if knob:
            table[name] = with_knobs(kept, {f"{place}.{knob}": value}, place)
        elif value != kept.get(key):
            table[name] = {key: value}
    return changed, rest


def _knob_of(flag: str) -> tuple[str, str]:
    """The table that a flag is about, and the knob; none where the flag names what the table is for."""
    found = re.match(_TABLE, flag)
    assert found
    place, knob = found[0], flag[found.end() + 1 :]
    return place, "" if knob == _key_of(place) else knob


def _key_of(place: str) -> str:
    return {"briefing": "kind", "follow": "rule"}.get(place.rpartition(".")[2], "name")
