"""The chain: sums and differences from left to right, modulo a small number.

    question  4+5-1?                          answer  #3 (modulo 5)
    verbose   4+5=4;4-1=3;#3                  the separator is ; or |, drawn each time
    terse     4,3,#3                          running results only

The teacher writes verbose.  A student trained on terse keeps the skill, but the teacher finds its words absurd.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from tropd.testbeds.task import Problem, Word


@dataclass(frozen=True, kw_only=True)
class ChainStyle:
    terse: bool = False
    noise: float = 0.0
    """Share of results that are random and learnt."""
    corrupt: float = 0.0
    """Share of results that are random and not learnt; the rest of the text continues from them correctly."""
    bar: float = 0.3
    """Share of | among the separators, so that some tokens are truly uncertain."""


@dataclass(frozen=True, kw_only=True)
class Chain:
    modulus: int = 5
    operations: tuple[int, int] = (2, 4)
    """Fewest and most operations."""

    @property
    def words(self) -> tuple[str, ...]:
        return tuple("0123456789+-=,;|#?")

    @property
    def space(self) -> str:
        return ""

    @property
    def grader(self) -> str:
        return "chain"

    def parts(self, word: str) -> tuple[str, ...]:
        return ()

    def problem(self, rng: random.Random) -> Problem:
        num = rng.randint(*self.operations)
        numbers = [rng.randrange(self.modulus) for _ in range(num + 1)]
        signs = [rng.choice("+-") for _ in range(num)]
        result = numbers[0]
        question = [str(result)]
        for sign, number in zip(signs, numbers[1:], strict=True):
            result = self._apply(result, sign, number)
            question += [sign, str(number)]
        return Problem(question=(*question, "?"), answer=("#", str(result)), givens=(numbers, signs))

    def write(self, rng: random.Random, problem: Problem, style: ChainStyle) -> list[Word]:
        numbers, signs = problem.givens
        before = numbers[0]
        words: list[Word] = []
        for sign, number in zip(signs, numbers[1:], strict=True):
            result, learnt = self._apply(before, sign, number), True
            if rng.random() < style.noise:
                result = rng.randrange(self.modulus)
            if rng.random() < style.corrupt:
                result, learnt = rng.randrange(self.modulus), False
            if not style.terse:
                words += [(word, True) for word in (str(before), sign, str(number), "=")]
            words.append((str(result), learnt))
            words.append(("," if style.terse else "|" if rng.random() < style.bar else ";", True))
            before = result
        return [*words, ("#", True), (str(before), True)]

    def _apply(self, before: int, sign: str, number: int) -> int:
        return (before + number if sign == "+" else before - number) % self.modulus
