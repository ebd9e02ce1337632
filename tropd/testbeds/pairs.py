"""The chain for a model whose tokens are pairs: a digit and the mark behind it are one word.

student  4 + 5 = 4 ; 4 - 1 = 3 ; # 3
teacher  4+  5=  4;  4-  1=  3;  # 3
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.task import Problem, Word

_DIGITS = "0123456789"


@dataclass(frozen=True, kw_only=True)
class Pairs(Chain):
    marks: str = "+-=,;|?"
    """Those that are one word with the digit before them."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*super().words, *(digit + mark for digit in _DIGITS for mark in self.marks))

    def problem(self, rng: random.Random) -> Problem:
        plain = super().problem(rng)
        joined = self._joined([(word, True) for word in plain.question])
        return dataclasses.replace(plain, question=tuple(word for word, _ in joined))

    def write(self, rng: random.Random, problem: Problem, style: ChainStyle) -> list[Word]:
        return self._joined(super().write(rng, problem, style))

    def _joined(self, words: Sequence[Word]) -> list[Word]:
        """A pair is learnt where both of its words are."""
        found: list[Word] = []
        for word, learnt in words:
            if found and word in self.marks and found[-1][0] in _DIGITS:
                found[-1] = (found[-1][0] + word, found[-1][1] and learnt)
            else:
                found.append((word, learnt))
        return found
