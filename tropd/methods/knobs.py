"""The knobs of a method, an extra or a policy, read from the source of its class."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from itertools import pairwise
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tropd.objective.schedules import Schedule


@dataclass(frozen=True, kw_only=True)
class Knob:
    name: str
    default: str
    choices: str
    meaning: str


def knobs_of(cls: type) -> Iterator[Knob]:
    hints, meanings = get_type_hints(cls), {}
    for home in reversed(cls.__mro__):
        meanings |= field_docstrings(home) if is_dataclass(home) else {}
    for field in fields(cls):
        if field.name not in ("name", "plus"):
            yield Knob(
                name=field.name,
                default=_default(field),
                choices=_choices(hints[field.name]),
                meaning=meanings.get(field.name, ""),
            )


def field_docstrings(cls: type) -> dict[str, str]:
    """The docstring below each field, which Python does not keep; none where there is no source."""
    try:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, SyntaxError):
        return {}
    body, docstrings = getattr(node, "body", []), {}
    for field, after in pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(after, ast.Expr):
            docstrings[field.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return docstrings


def _default(field: Field[Any]) -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is MISSING:
        return "none: give it"
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if is_dataclass(value) and not isinstance(value, Schedule):
        return f"{type(value).__name__}()"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _choices(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin in (Union, UnionType):
        return " | ".join(map(_choices, args))
    if origin is tuple:
        return f"list of {_choices(args[0])}"
    known = {NoneType: "none", bool: "true | false", int: "integer", float: "number", str: "text"}
    return known.get(hint) or hint.__name__
