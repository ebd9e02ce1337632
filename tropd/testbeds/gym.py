"""Tasks of the package reasoning-gym, with its own questions, answers and verifiers.

sum     State the final answer to the following arithmetic problem: 4 - 1 - 7 =
        verbose: 4-1=3;3-7=-4;<answer>-4</answer>        terse: <answer>-4</answer>
word    Spell this word backward (example: sun -> nus): leally
        verbose: leally>yllael;<answer>yllael</answer>   terse: <answer>yllael</answer>

A character is a token, and so is each opening sentence of the questions, which makes texts a third as long.
"""

from __future__ import annotations

import functools
import json
import random
import string
from dataclasses import dataclass
from typing import Any

from tropd.errors import ConfigError
from tropd.testbeds.task import Problem, Word

_OPEN, _CLOSE = "<answer>", "</answer>"
_PUNCTUATION = " ;=+->"
_BEGINNINGS = (
    "State the final answer to the following arithmetic problem: ",
    "Spell this word backward (example: sun -> nus): ",
)
_MANY = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class GymStyle:
    terse: bool = False
    noise: float = 0.0
    """Share of partial results and letters that are random and learnt."""


@dataclass(frozen=True, kw_only=True)
class Gym:
    terms: tuple[int, int] = (2, 4)
    """Fewest and most terms of a sum of digits."""
    letters: tuple[int, int] = (3, 6)
    """Fewest and most letters of a word."""

    @property
    def words(self) -> tuple[str, ...]:
        return (_OPEN, _CLOSE, *_BEGINNINGS, *_PUNCTUATION, *string.digits, *string.ascii_letters)

    @property
    def space(self) -> str:
        return ""

    @property
    def grader(self) -> str:
        return "gym"

    def parts(self, word: str) -> tuple[str, ...]:
        return ()

    def problem(self, rng: random.Random) -> Problem:
        low, high = self.terms
        short, long = self.letters
        if rng.random() < 0.5:
            source = _dataset("chain_sum", min_terms=low, max_terms=high, min_digits=1, max_digits=1)
        else:
            source = _dataset("spell_backward", min_word_len=short, max_word_len=long)
        entry = source[rng.randrange(_MANY)]
        return Problem(
            question=_split(entry["question"]),
            answer=(_OPEN, *entry["answer"], _CLOSE),
            givens=entry,
            columns={"entry": json.dumps(entry)},
        )

    def write(self, rng: random.Random, problem: Problem, style: GymStyle) -> list[Word]:
        known = problem.givens["metadata"]
        if "expression" in known:
            steps, result = _sum(rng, known["expression"].split(), style.noise)
        else:
            letters = [_blind(rng, letter, style.noise) for letter in reversed(known["word"])]
            steps, result = f"{known['word']}>{''.join(letters)};", "".join(letters)
        words = [*("" if style.terse else steps), _OPEN, *result, _CLOSE]
        return [(word, True) for word in words]


def _split(question: str) -> tuple[str, ...]:
    (beginning,) = [each for each in _BEGINNINGS if question.startswith(each)]
    return (beginning, *question.removeprefix(beginning))


def _sum(rng: random.Random, expression: list[str], noise: float) -> tuple[str, str]:
    total, steps = int(expression[0]), ""
    for sign, term in zip(expression[1::2], expression[2::2], strict=True):
        new = total + int(sign + term)
        if rng.random() < noise:
            new = rng.randint(-9, 18)
        steps += f"{total}{sign}{term}={new};"
        total = new
    return steps, str(total)


def _blind(rng: random.Random, letter: str, noise: float) -> str:
    return rng.choice(string.ascii_lowercase) if rng.random() < noise else letter


@functools.cache
def _dataset(name: str, **settings: int) -> Any:
    try:
        from reasoning_gym import create_dataset  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("testbed 'gym' needs reasoning-gym. Run: pip install 'tropd[gym]'") from None
    return create_dataset(name, seed=0, size=_MANY, **settings)
