"""A briefing of solved examples.  `tropd.data.examples` finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from tropd.briefings.asked import (
    PROMPT,
    Asked,
    Briefing,
    Messages,
    check_counts,
    check_switch,
    check_template,
    check_texts,
)
from tropd.errors import ConfigError

_GOOD = (
    "Below are other problems, each with a solution that is right. See how they are solved.\n\n{examples}\n\n"
    "Now solve this problem:\n\n{prompt}"
)
_BAD = (
    "Below are other problems, each with a solution that is wrong. Avoid what went wrong there.\n\n{examples}\n\n"
    "Now solve this problem:\n\n{prompt}"
)


@dataclass(frozen=True, kw_only=True)
class WithDemonstrations(Briefing):
    """Other problems with their solutions: the nearest ones by their words, or random ones.

    The problem that is asked is never among them.
    """

    kind: Literal["demonstrations"] = "demonstrations"
    source: str | None = None
    """A data set with problems and solutions; by default that of the run."""
    problem: str = "prompt"
    """Its column of problems."""
    solution: str = "solution"
    """Its column of solutions."""
    count: int = 3
    """How many are told.  (UniSD: 3) At least 1."""
    good: bool = True
    """Whether the solutions are right.  With false the reader is told that they are wrong."""
    pick: Literal["nearest", "random"] = "nearest"
    """Which ones: "nearest" compares words (BM25, the extra `retrieval`)."""
    draw: int = 0
    """Readers with other draws are told other examples: other random ones, or the next nearest."""
    template: str | None = None
    """The last turn of the user: {prompt} is what is asked, {examples} the examples; a brace is {{ or }}.  By default
    it says whether the solutions are right."""
    example: str = "Problem:\n{problem}\n\nSolution:\n{solution}"
    """How one is written."""
    needs_template: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_texts(self, "problem", "solution", *(["source"] if self.source is not None else []))
        check_counts(self, "count", "draw")
        check_switch(self, "good")
        if not self.count:
            raise ConfigError("briefing.count is 0, so no example is told. Give at least 1.")
        if self.pick not in ("nearest", "random"):
            raise ConfigError(f"briefing.pick is {self.pick!r}; there are 'nearest' and 'random'.")
        if self.template is not None:
            check_template(self, "template", (PROMPT, "examples"))
        check_template(self, "example", ("problem", "solution"))

    def messages(self, asked: Asked) -> Messages | None:
        if not asked.examples:
            return None
        told = [self.example.format(problem=each.problem, solution=each.solution) for each in asked.examples]
        return asked.last_turn(self.template or (_GOOD if self.good else _BAD), examples="\n\n".join(told))
