"""What a briefing is made of, and what it is: the messages that a reader reads instead of the student's.

Before the run     the student's messages, the row of the data set, solved examples
During training    also the response that is read, its reward, the grader's words, the other responses to the prompt
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Flag, auto
from string import Formatter
from typing import Any, ClassVar

from tropd.errors import ConfigError
from tropd.types import Message

Messages = tuple[Message, ...]
PROMPT = "prompt"


class Facts(Flag):
    """What has to be known of a response before a reader can be told of it."""

    NOTHING = 0
    RESPONSE = auto()
    """The response itself."""
    REWARD = auto()
    """Rewards: needs a grader."""
    WORDS = auto()
    """The grader's words: needs a grader that gives some."""
    GROUP = auto()
    """The other responses to the prompt: needs rollout.num_rollouts above 1."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """A response as a briefing sees it."""

    text: str
    reward: float | None = None
    words: str | None = None
    """What the grader said of it."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """A problem of a data set with a solution."""

    problem: str
    solution: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """Everything that is known when a briefing is made."""

    messages: Messages
    """What the student reads; the last one is what is asked."""
    row: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the data set: all of them before the run, those of `Prompt.columns` during training."""
    answer: str | None = None
    """What the grader compares with."""
    examples: tuple[Example, ...] = ()
    response: Response | None = None
    """The one that is read."""
    peers: tuple[Response, ...] = ()
    """The other responses to the prompt, from the one after `response` round to the one before it."""

    def last_turn(self, template: str, **values: str) -> Messages:
        """The messages with another last turn: {prompt} in the template is the one that they have."""
        *before, last = self.messages
        return (*before, Message(role=last.role, content=template.format(prompt=last.content, **values)))


@dataclass(frozen=True, kw_only=True)
class Briefing:
    """Inherit from it, as a frozen dataclass, and give `messages`; with `needs`, it is made anew for each response."""

    needs: ClassVar[Facts] = Facts.NOTHING
    """What it reads of responses.  With NOTHING it is made once, when prompts are loaded."""
    needs_template: ClassVar[bool] = True
    """Whether it only makes sense where prompts are conversations."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data set that every row must have."""
        return ()

    def messages(self, asked: Asked) -> Messages | None:
        """What the reader reads instead of the student's messages; None where there is nothing to tell."""
        raise NotImplementedError(f"{type(self).__name__} says nothing: a briefing defines `messages`.")


def check_texts(briefing: Briefing, *names: str) -> None:
    """Refuse what is no text."""
    for name in names:
        value = getattr(briefing, name)
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"briefing.{name} is {value!r}, which is no text. Write it out.")


def check_switch(briefing: Briefing, name: str) -> None:
    """Refuse what is neither true nor false: the text "false" would count as true."""
    if not isinstance(value := getattr(briefing, name), bool):
        raise ConfigError(f"briefing.{name} is {value!r}, which is neither true nor false. Write it without quotes.")


def check_counts(briefing: Briefing, *names: str) -> None:
    """Refuse what is no whole number of things."""
    for name in names:
        value = getattr(briefing, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"briefing.{name} is {value!r}, which is no number of things. Give 0 or more.")


def check_template(briefing: Briefing, name: str, needed: tuple[str, ...], others: tuple[str, ...] = ()) -> None:
    """Refuse a template that cannot be read, has a field that nobody fills, or lacks one that is needed."""
    check_texts(briefing, name)
    try:
        parts = [part for part in Formatter().parse(getattr(briefing, name)) if part[1] is not None]
    except ValueError as problem:
        raise ConfigError(f"briefing.{name} cannot be read: {problem}. A brace is written {{{{ or }}}}.") from None
    if formatted := [field for _, field, form, conversion in parts if form or conversion]:
        raise ConfigError(
            f"briefing.{name} formats the field {{{formatted[0]}}} with `:` or `!`, but fields are texts that are put "
            f"in as they are. Write {{{formatted[0]}}}; a brace is written {{{{ or }}}}."
        )
    named = [field for _, field, _, _ in parts if field is not None]
    known = (*needed, *others)
    if unknown := [field for field in named if field not in known]:
        *first, last = (f"{{{field}}}" for field in known)
        there = f"there are only {', '.join(first)} and {last}" if first else f"there is only {last}"
        raise ConfigError(
            f"briefing.{name} has the field {{{unknown[0]}}}, but {there}. Take it out; a brace is written {{{{ or "
            "}}."
        )
    if missing := [field for field in needed if field not in named]:
        raise ConfigError(
            f"briefing.{name} has no {{{missing[0]}}}, so the teacher would not read it. Put it where it belongs."
        )
