"""Ranges of numbers: a field's type says its range, and `check_ranges` is the one place that checks it.

    rank: Count = 32            # Annotated[int, Range(at_least=1)]
    alpha: PositiveShare = 0.2  # Annotated[float, Range(above=0, at_most=1)]

A dataclass that inherits `Ranged` refuses a number out of range when it is made, wherever that is: a run file, a flag
or Python.  NaN and infinity are refused everywhere; so are a bool, a text and, for whole numbers, a fraction.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from types import NoneType
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

from tropd.errors import OutOfRange

LARGEST = 2**63 - 1
"""Whole numbers end here, as in TOML and in tensors."""


@dataclass(frozen=True)
class Range:
    """The values that a number may have.  `str` gives the words that docstrings and errors use."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    unbounded: bool = False
    """Whether infinity is a value as well, where it switches something off."""
    advice: str = ""
    """What to do instead, at the end of an error."""

    def __contains__(self, x: float) -> bool:
        return (
            x == x  # NaN is no number
            and (self.unbounded or abs(x) <= sys.float_info.max)
            and (self.at_least is None or x >= self.at_least)
            and (self.above is None or x > self.above)
            and (self.at_most is None or x <= self.at_most)
            and (self.below is None or x < self.below)
        )

    def __str__(self) -> str:
        low, high = self._end(self.at_least, self.above), self._end(self.at_most, self.below)
        if low and high:
            return f"in {'[('[self.at_least is None]}{low}, {high}{'])'[self.at_most is None]}"
        if low:
            return f"at least {low}" if self.above is None else f"above {low}"
        if high:
            return f"at most {high}" if self.below is None else f"below {high}"
        return "any number" if self.unbounded else "any finite number"

    @staticmethod
    def _end(closed: float | None, opened: float | None) -> str:
        end = opened if closed is None else closed
        return "" if end is None else str(int(end)) if end == int(end) else f"{end:g}"


Count = Annotated[int, Range(at_least=1)]
Whole = Annotated[int, Range(at_least=0)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(at_least=0, at_most=1)]
PositiveShare = Annotated[float, Range(above=0, at_most=1)]
Between = Annotated[float, Range(above=0, below=1)]
Finite = Annotated[float, Range()]
LearningRate = PositiveShare
Seconds = Annotated[float, Range(above=0, at_most=10**6)]


class Ranged:
    """A dataclass whose numbers have ranges.  One that checks more calls `super().__post_init__()` first."""

    __slots__ = ()
    section: ClassVar[str | None] = None
    """What errors call it; by default the class's name."""

    def __post_init__(self) -> None:
        check_ranges(self)


def check_ranges(value: Any) -> None:
    """Refuse the first number of a dataclass that is out of its field's range."""
    for name, kinds in _ranged_fields(type(value)):
        for x in _numbers(getattr(value, name)):
            problem = _problem(x, kinds)
            if problem:
                section = getattr(value, "section", None)
                raise OutOfRange(
                    type(value).__name__ if section is None else section,
                    f"{name} = {short_value(x)} was asked for, but it must be {problem}.",
                )


@cache
def _ranged_fields(cls: type) -> tuple[tuple[str, tuple[tuple[Any, Range | None], ...]], ...]:
    hints = get_type_hints(cls, include_extras=True)
    kinds_by_field = ((f.name, tuple(kinds_of(hints[f.name]))) for f in fields(cls))
    return tuple((name, kinds) for name, kinds in kinds_by_field if any(wanted for _, wanted in kinds))


def kinds_of(hint: Any) -> Iterator[tuple[Any, Range | None]]:
    """The classes in a type hint, each with its range."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        wanted = next((note for note in notes if isinstance(note, Range)), None)
        yield from ((kind, wanted or own) for kind, own in kinds_of(inner))
    elif isinstance(hint, type) and not get_args(hint):
        yield hint, None
    elif get_origin(hint) is not None:
        for inner in get_args(hint):
            yield from kinds_of(inner)


def _numbers(value: Any) -> Iterator[Any]:
    inner = value.values() if isinstance(value, Mapping) else value
    if isinstance(value, Mapping | tuple | list | frozenset):
        for x in inner:
            yield from _numbers(x)
    else:
        yield value


def _problem(x: Any, kinds: tuple[tuple[Any, Range | None], ...]) -> str:
    """What the number must be, or "" where it is in range; values of the field's other classes are not checked."""
    if any(wanted is None and isinstance(x, kind) for kind, wanted in kinds):
        return ""
    kind, wanted = next((kind, wanted) for kind, wanted in kinds if wanted is not None)
    allowed = f"{wanted}, or left out" if any(kind is NoneType for kind, _ in kinds) else str(wanted)
    allowed += f": {wanted.advice}" if wanted.advice else ""
    if isinstance(x, bool) or not isinstance(x, int if kind is int else int | float):
        return f"a {'whole number' if kind is int else 'number'}, {allowed}"
    if x not in wanted:
        return allowed if abs(x) < math.inf else f"a finite number, {allowed}"
    return f"at most {LARGEST}" if kind is int and wanted.at_most is None and x > LARGEST else ""


def short_value(value: Any) -> str:
    """A value as errors show it, however long it is."""
    try:
        text = repr(value)
    except ValueError:  # a whole number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"
