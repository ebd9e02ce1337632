"""The chain with a worked solution to each question, and models that have learnt to look into one.

    plain     4+5-1?                      4+5=4;4-1=3;#3 (modulo 5)
    told      4+5=4|4-1=3;#3>4+5-1?       the same answer, with the solution in front of the question

Every row has its solution in a column, so a teacher can be told it: briefing = { kind = "column", column = "solution",
template = "{value}>{prompt}" }.  The student believes in some wrong sums, unless a solution says otherwise.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.task import Problem, Word


@dataclass(frozen=True, kw_only=True)
class Told(Chain):
    share: float = 0.0
    """Share of questions with a solution in front of them."""
    wrong: float = 0.0
    """Share of sums, always the same, that come out wrong where there is none."""

    @property
    def words(self) -> tuple[str, ...]:
        return (*super().words, ">")

    def problem(self, rng: random.Random) -> Problem:
        plain = self._right.problem(rng)
        solution = tuple(word for word, _ in self._right.write(rng, plain, ChainStyle()))
        told = rng.random() < self.share
        return dataclasses.replace(
            plain,
            question=(*solution, ">", *plain.question) if told else plain.question,
            givens=(plain, told),
            columns={"solution": "".join(solution)},
        )

    def write(self, rng: random.Random, problem: Problem, style: ChainStyle) -> list[Word]:
        plain, told = problem.givens
        return self._right.write(rng, plain, style) if told else super().write(rng, plain, style)

    @property
    def _right(self) -> Chain:
        return Chain(modulus=self.modulus, operations=self.operations)

    def _apply(self, before: int, sign: str, number: int) -> int:
        slips = random.Random(f"{before}{sign}{number}").random() < self.wrong
        return (super()._apply(before, sign, number) + slips) % self.modulus
