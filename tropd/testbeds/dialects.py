"""A recurrence in 24 dialects: answers of 230 tokens, a vocabulary of 1,100.

    x(k+1) = x(k) +- x(k-1) + c   modulo m

question  d3 d5 d+ d+2 d(21) d?                     x(0), x(1), sign, c and how many steps, every word in dialect d
verbose   d(1) d: d5 d+ d3 d= d1 d+2 d= d3 d; ...   modulo 7; it ends in # 4, which is the same in every dialect
terse     d(1) d3 d; ...

The testbed "long", seed 0: the teacher solves 89 % at temperature 1 and 100 % greedily, and knows one dialect per
text. The student is smaller, solves 68 % greedily, and mixes dialects: 10 % at temperature 1. Of its tokens 29 % have
a log-ratio below -5. In texts with mixed words the teacher gets 5 % of the sums wrong (0 % elsewhere).
From 60 tokens of its own text it continues correctly in 47 of 48 texts, from 60 tokens of the student in 8 of 40.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tropd.testbeds.task import Problem, Word

_SIGNS = "+-=:;|?"


@dataclass(frozen=True, kw_only=True)
class DialectStyle:
    terse: bool = False
    foreign: float = 0.0
    """Share of texts in another dialect than the question's."""
    mixed: float = 0.0
    """Share of words in a random dialect."""
    noise: float = 0.0
    """Share of results that are random and learnt."""
    bar: float = 0.3
    """Share of | among the separators, so that some tokens are truly uncertain."""


@dataclass(frozen=True, kw_only=True)
class Dialects:
    modulus: int = 7
    steps: tuple[int, int] = (19, 22)
    """Fewest and most steps."""
    most: int = 24
    """Largest label of a step."""
    dialects: str = "abcdefghijklmnopqrstuvwx"

    @property
    def words(self) -> tuple[str, ...]:
        numbers = [str(n) for n in range(self.modulus)]
        symbols = [*_SIGNS, *numbers, *(f"+{n}" for n in numbers), *(f"({n})" for n in range(1, self.most + 1))]
        return ("#", *numbers, *(d + s for d in self.dialects for s in symbols))

    @property
    def space(self) -> str:
        return " "

    @property
    def grader(self) -> str:
        return "chain"

    def parts(self, word: str) -> tuple[str, ...]:
        """The dialect and the symbol; the end of an answer belongs to no dialect."""
        return (word[0], word[1:]) if word[0] in self.dialects else ()

    def problem(self, rng: random.Random) -> Problem:
        dialect, sign = rng.choice(self.dialects), rng.choice("+-")
        before, now, constant = (rng.randrange(self.modulus) for _ in range(3))
        num = rng.randint(*self.steps)
        givens = (dialect, before, now, sign, constant, num)
        question = (str(before), str(now), sign, f"+{constant}", f"({num})", "?")
        for _ in range(num):
            before, now = now, (self._join(now, sign, before) + constant) % self.modulus
        return Problem(question=tuple(dialect + s for s in question), answer=("#", str(now)), givens=givens)

    def write(self, rng: random.Random, problem: Problem, style: DialectStyle) -> list[Word]:
        dialect, before, now, sign, constant, num = problem.givens
        if rng.random() < style.foreign:
            dialect = rng.choice(self.dialects)
        symbols: list[str] = []
        for label in range(num, 0, -1):
            joint = self._join(now, sign, before)
            new = (joint + constant) % self.modulus
            if rng.random() < style.noise:
                new = rng.randrange(self.modulus)
            sums = [":", str(now), sign, str(before), "=", str(joint), f"+{constant}", "="]
            separator = "|" if rng.random() < style.bar else ";"
            symbols += [f"({label})", *([] if style.terse else sums), str(new), separator]
            before, now = now, new
        spoken = [(rng.choice(self.dialects) if rng.random() < style.mixed else dialect) + symbol for symbol in symbols]
        return [(word, True) for word in (*spoken, "#", str(now))]

    def _join(self, now: int, sign: str, before: int) -> int:
        return (now + before if sign == "+" else now - before) % self.modulus
