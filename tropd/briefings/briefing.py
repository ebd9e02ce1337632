"""What a reader is told and the student is not: plain data, `briefing` in the section of a teacher.

student   the prompt                  -> response
teacher   the prompt, and more        -> the same tokens of that response

A briefing changes the messages before the response.  `tropd.data.briefer` renders them and checks that both prompts
open the assistant's turn alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import isnan
from typing import Any, ClassVar, Literal

from tropd.base.names import find, is_name, made, name_of, offered
from tropd.base.reading import nearest
from tropd.briefings.asked import PROMPT, Asked, Briefing, Messages, check_template, check_texts
from tropd.briefings.demonstrations import WithDemonstrations
from tropd.briefings.responses import WithFeedback, WithPeers
from tropd.errors import ConfigError, DataError
from tropd.types import Message


@dataclass(frozen=True, kw_only=True)
class AsStudent(Briefing):
    """Nothing: the reader reads what the student reads."""

    kind: Literal["as_student"] = "as_student"
    needs_template: ClassVar[bool] = False

    def messages(self, asked: Asked) -> Messages:
        return asked.messages


@dataclass(frozen=True, kw_only=True)
class WithColumn(Briefing):
    """A column of the data set, such as a solution, a hint or a document, beside what is asked."""

    kind: Literal["column"] = "column"
    column: str
    """The one that the teacher reads."""
    template: str = (
        "{prompt}\n\nHere is a solution to this problem:\n\n{value}\n\n"
        "Read it until each step is clear. Then solve the problem yourself, step by step, in your own words."
    )
    """The last turn of the user: {prompt} is what was asked, {value} the column's text; a brace is {{ or }}.  The
    default says in other words what OPSD's says (arXiv:2601.18734)."""
    needs_template: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_texts(self, "column")
        check_template(self, "template", (PROMPT, "value"))

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column,)

    def messages(self, asked: Asked) -> Messages:
        value = asked.row.get(self.column)
        if isinstance(value, float) and isnan(value):  # how a column of numbers says that there is none
            value = None
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = str(value)
        if value is not None and not isinstance(value, str):
            raise DataError(f"'{self.column}' is a {type(value).__name__}, and the teacher is told a text")
        if value is None or not value.strip():
            raise DataError(f"nothing in '{self.column}'")
        return asked.last_turn(self.template, value=value)


@dataclass(frozen=True, kw_only=True)
class WithSystem(Briefing):
    """A text in front of the conversation: its system prompt, or the end of the one that it has."""

    kind: Literal["system"] = "system"
    text: str

    def __post_init__(self) -> None:
        check_texts(self, "text")

    def messages(self, asked: Asked) -> Messages:
        messages = asked.messages
        if messages[0].role != "system":
            return (Message(role="system", content=self.text), *messages)
        return (Message(role="system", content=f"{messages[0].content}\n\n{self.text}"), *messages[1:])


@dataclass(frozen=True, kw_only=True)
class OwnBriefing(Briefing):
    """One of your own as a run file has it: the name of its class, and what that is made with."""

    kind: str
    knobs: dict[str, Any] = field(default_factory=dict)

    def imported(self) -> Briefing:
        """The briefing itself: this runs the code that `kind` names."""
        said = f"briefing {self.kind!r}"
        briefing = made(find(self.kind, "briefing"), self.knobs, said)
        if not isinstance(briefing, Briefing):
            raise ConfigError(f"{said} is a {type(briefing).__name__}. Give a class that inherits from tropd.Briefing.")
        return briefing


BRIEFINGS: dict[str, type[Briefing]] = {
    "as_student": AsStudent,
    "column": WithColumn,
    "system": WithSystem,
    "feedback": WithFeedback,
    "peers": WithPeers,
    "demonstrations": WithDemonstrations,
}


def read_briefing(value: Any) -> Briefing:
    """From a table of a run file, or one made in Python.  Code of your own is not imported here."""
    if isinstance(value, Briefing):
        return _named(value)
    table = {"kind": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("kind"), str):
        raise ConfigError(
            f"teacher.briefing is {value!r}, but a briefing is a table with its kind, such as "
            "{ kind = 'column', column = 'solution' }."
        )
    kind, knobs = table["kind"], {name: x for name, x in table.items() if name != "kind"}
    if kind in BRIEFINGS:
        return made(BRIEFINGS[kind], knobs, f"briefing {kind!r}")
    if not is_name(kind) and kind not in offered("briefings"):
        raise ConfigError(
            f"there is no briefing {kind!r}{nearest(kind, BRIEFINGS)}; there are {', '.join(BRIEFINGS)}, and your own "
            "as 'package.module:Class' or 'file.py:Class'."
        )
    return made(OwnBriefing, {"kind": kind, **knobs}, f"briefing {kind!r}")


def _named(briefing: Briefing) -> Briefing:
    """One of your own under the name by which a run file finds it again."""
    if isinstance(briefing, OwnBriefing) or type(briefing) in BRIEFINGS.values():
        return briefing
    name = name_of(type(briefing))
    if name is None:
        raise ConfigError(f"briefing {type(briefing).__name__} is in no file, so no run can find it again. Move it.")
    return OwnBriefing(kind=name, knobs={f.name: getattr(briefing, f.name) for f in fields(briefing)})


__all__ = [
    "BRIEFINGS",
    "AsStudent",
    "Briefing",
    "OwnBriefing",
    "WithColumn",
    "WithDemonstrations",
    "WithFeedback",
    "WithPeers",
    "WithSystem",
    "read_briefing",
]
