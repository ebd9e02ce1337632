"""Solved examples for a problem: the nearest ones by their words (BM25, by the package bm25s), or random ones."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from tropd.base.reading import nearest
from tropd.briefings.asked import Briefing, Example, Messages
from tropd.briefings.demonstrations import WithDemonstrations
from tropd.data.chat import parse_messages
from tropd.data.rows import Row, Table, open_table
from tropd.errors import DataError, require
from tropd.types import Message, key_of

_WORD = re.compile(r"[^\W\u3040-\u9fff]+|[\u3040-\u9fff]")
"""Chinese and Japanese have no spaces between words: each character counts."""


class Shelf:
    """The problems of a data set that have a solution."""

    def __init__(self, table: Table, problem: str, solution: str) -> None:
        for column in (problem, solution):
            if column not in table.columns:
                has = f"{nearest(column, table.columns)}; it has {', '.join(table.columns)}"
                raise DataError(
                    f"a briefing shows examples from column '{column}', but {table.source} has none{has}. Set "
                    "briefing.problem and briefing.solution."
                )
        self.examples: list[Example] = []
        self._problems: dict[int, str] = {}
        self._places: dict[str, list[int]] = {}
        for number, row in table.read():
            asked, told = _text(row, problem), _text(row, solution)
            if asked and told:
                key = self._problems[number] = _key(row[problem])
                self._places.setdefault(key, []).append(len(self.examples))
                self.examples.append(Example(problem=asked, solution=told))
        if not self.examples:
            raise DataError(
                f"no row of {table.source} has both '{problem}' and '{solution}', so no example can be shown."
            )

    def pick(self, messages: Messages, briefing: WithDemonstrations, row: int | None) -> tuple[Example, ...]:
        """The examples for a question, without the question itself; `row` is its number, if it is one of these."""
        question = messages[-1].content
        keys = {_key(question), _key(messages), *([] if row is None else [self._problems.get(row)])}
        own = {place for key in keys if key is not None for place in self._places.get(key, ())}
        if briefing.pick == "random":
            draws = random.Random(key_of(briefing.draw, "examples", question))
            start, chosen = (
                0,
                draws.sample(range(len(self.examples)), min(len(self.examples), briefing.count + len(own))),
            )
        else:
            start, chosen = briefing.draw * briefing.count, self._by_nearness(question)
        others = [place for place in chosen if place not in own]
        return tuple(self.examples[place] for place in others[start : start + briefing.count])

    def _by_nearness(self, question: str) -> list[int]:
        words = _words(question)
        if not words:
            return list(range(len(self.examples)))
        return np.argsort(-self._index.get_scores(words), kind="stable").tolist()

    @cached_property
    def _index(self) -> Any:
        require("bm25s", "retrieval", 'briefing.pick = "nearest"')
        import bm25s  # pyright: ignore[reportMissingImports]

        index = bm25s.BM25()
        index.index([_words(example.problem) for example in self.examples], show_progress=False)
        return index


class Shelves:
    """The examples of every briefing that shows some, each data set read once."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[str | None, str, str], Shelf] = {}
        self._same: set[str | None] = {None}
        """Sources that are the data set of the run, whatever names them."""

    def fetch(self, briefing: WithDemonstrations, table: Table) -> None:
        """Read what a briefing shows; `table` is the data set of the run."""
        key = (briefing.source, briefing.problem, briefing.solution)
        if key not in self._shelves:
            shown = open_table(briefing.source) if briefing.source else table
            if shown.source == table.source:
                self._same.add(briefing.source)
            self._shelves[key] = Shelf(shown, *key[1:])

    def pick(self, briefing: Briefing, messages: Messages, row: int) -> tuple[Example, ...]:
        """The examples that a briefing shows beside a question, the row of the run's data set with that number; none if
        it shows none."""
        if not isinstance(briefing, WithDemonstrations):
            return ()
        shelf = self._shelves[briefing.source, briefing.problem, briefing.solution]
        return shelf.pick(messages, briefing, row if briefing.source in self._same else None)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _key(problem: Any) -> str:
    """The same for the same text or conversation, whatever its case, its spaces and its system prompt."""
    turns = [str(problem)]
    if isinstance(problem, list | tuple):
        messages = [x if isinstance(x, Message) else parse_messages([x])[0] for x in problem]
        turns = [x.content for x in messages if x.role != "system"]
    return "\n".join(" ".join(turn.casefold().split()) for turn in turns) + ("" if len(turns) == 1 else "\n")


def _text(row: Row, column: str) -> str:
    """The text of a column, or of the last turn of a conversation in it; nothing where there is none."""
    value = row.get(column)
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        value = parse_messages(value)[-1].content
    if isinstance(value, float) and math.isnan(value):  # how a column of numbers says that there is none
        return ""
    return str(value).strip() if isinstance(value, str | int | float) else ""
