"""Graders: `(prompts, completions, **columns) -> list[float]`, one number per completion (TRL's reward signature).

A completion is text or a list of messages; `answer` is the column to compare with.  Anything with this signature is a
grader: name it "package.module:function" or "file.py:function".  Instead of a number it may give a `Grade`, which has
words as well; those of tropd say whether an answer is right.
"""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import isfinite
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, cast

from tropd.base.names import find, made, offered
from tropd.base.ranges import NotNegative, Ranged
from tropd.base.reading import nearest
from tropd.data.answers import final_text, last_boxed, normalize, read_choice, read_number
from tropd.data.chat import parse_messages
from tropd.data.gym import gym
from tropd.data.math_process import MathProcess
from tropd.errors import DataError
from tropd.types import Prompt, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_ONE_AT_A_TIME = threading.RLock()
"""A grader may be asked of a batch that is written ahead while it grades the batch that is trained."""

# What every grader gets by position: a column of that name cannot be handed over as well.
_POSITIONAL = ("prompts", "completions")


@dataclass(frozen=True, kw_only=True)
class Grade:
    """What a grader finds: a number, and what it says of the completion, for readers that are told it."""

    reward: float
    words: str | None = None


class Grader(Protocol):
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any
    ) -> Sequence[float | Grade]: ...


def exact(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the text is the answer, up to case, spaces and surrounding punctuation."""
    pairs = _pairs("exact", completions, columns)
    return [float(normalize(text) == normalize(answer)) for text, answer in pairs]


def ends_in_answer(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the text ends in the answer, mark and all, such as #3 (the tasks of tropd.testbeds)."""
    return [float(text.endswith(answer)) for text, answer in _pairs("chain", completions, columns)]


@dataclass(frozen=True, kw_only=True)
class Numeric(Ranged):
    """1 where the last number equals the answer's last number; integers exactly, others within a relative tolerance.

    A percentage also equals its bare number and its hundredth part: 50% = 50 = 0.5.
    """

    tolerance: NotNegative = 1e-6

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [self._score(text, answer) for text, answer in _pairs("numeric", completions, columns)]

    def _score(self, text: str, answer: str) -> float:
        expected, number = read_number(answer), read_number(text)
        if expected is None:
            raise DataError(f"grader 'numeric' finds no number in the answer {answer!r}. Give answers with a number.")
        if number is None:
            return 0.0
        scales = (1,) if expected.is_percent == number.is_percent else (1, 100)
        small, large = (number, expected) if expected.is_percent else (expected, number)
        return float(any(self._equal(small.value * scale, large.value) for scale in scales))

    def _equal(self, a: Fraction, b: Fraction) -> bool:
        if a.denominator == b.denominator == 1:
            return a == b
        return abs(a - b) <= Fraction(self.tolerance) * max(abs(a), abs(b))


def multiple_choice(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 where the completion settles on the answer's letter, A to J."""
    scores = []
    for text, answer in _pairs("multiple_choice", completions, columns):
        expected = read_choice(answer)
        if expected is None:
            raise DataError(f"grader 'multiple_choice' finds no letter A-J in the answer {answer!r}. Give letters.")
        scores.append(float(read_choice(text) == expected))
    return scores


class Math:
    """1 where math-verify finds the completion equal to the answer, or where both are the same text.

    What it cannot compare within the limits of its process scores 0, with a warning.
    """

    def __init__(self, *, seconds: float = 10.0, memory: int = 2**31) -> None:
        self.process = MathProcess(seconds, memory)

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [self._score(text, answer) for text, answer in _pairs("math", completions, columns)]

    def close(self) -> None:
        self.process.close()

    def _score(self, text: str, answer: str) -> float:
        boxed = last_boxed(text)
        if normalize(text if boxed is None else boxed) == normalize(answer):
            return 1.0
        has_delimiters = "$" in answer or "\\boxed" in answer or "\\(" in answer or "\\[" in answer
        right = self.process.compare(answer if has_delimiters else f"\\boxed{{{answer}}}", text)
        if right is None:
            warnings.warn(
                f"math-verify did not compare {text[-80:]!r} with {answer!r}: it took more than "
                f"{self.process.seconds:g} s or {self.process.memory >> 20} MiB, or its process died. Scored 0.",
                RuntimeWarning,
                stacklevel=2,
            )
        return float(right or False)


numeric = Numeric()
math = Math()

GRADERS: dict[str, Grader] = {
    "exact": exact,
    "numeric": numeric,
    "multiple_choice": multiple_choice,
    "math": math,
    "chain": ends_in_answer,
    "gym": gym,
}


def resolve_grader(name: str) -> Grader:
    """A grader by its name in GRADERS, by that of one which an installed package offers, or by "package.module:name"
    or "file.py:name": a function, a class whose objects are graders, or an object."""
    if name in GRADERS:
        grader = GRADERS[name]
        if isinstance(grader, Math):
            grader.process.require()
        return grader
    known = (*GRADERS, *offered("graders"))
    if ":" not in name and name not in known:
        raise DataError(
            f"there is no grader '{name}'{nearest(name, known)}; there are {', '.join(known)}. "
            "Give one of these, or your own as 'package.module:name' or 'file.py:name'."
        )
    return check_grader(find(name, "grader", DataError), name)


def check_grader(grader: Any, name: str) -> Grader:
    """A grader of the user's own, made if it is a class, if it can be called as graders are."""
    if inspect.isclass(grader):
        grader = made(grader, {}, f"grader '{name}'", DataError)
    if not callable(grader):
        raise DataError(f"grader '{name}' is a {type(grader).__name__}. Give a function, or an object with __call__.")
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in inspect.signature(grader).parameters.values()):
        raise DataError(f"grader '{name}' takes no **columns. Define it as f(prompts, completions, **columns).")
    return cast(Grader, grader)


def graded(grader: Grader, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    """The rollouts with a reward, and perhaps words, from the text of each response (special tokens left out)."""
    completions = [str(tokenizer.decode(list(rollout.response_ids), skip_special_tokens=True)) for rollout in rollouts]
    found = _grades(grader, [rollout.prompt for rollout in rollouts], completions, tokenizer)
    return [replace(r, reward=each.reward, feedback=each.words) for r, each in zip(rollouts, found, strict=True)]


def grade_texts(
    grader: Grader, prompts: Sequence[Prompt], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[float]:
    """One finite number per completion.  The grader gets the prompt's columns, and its answer as `answer`."""
    return [each.reward for each in _grades(grader, prompts, completions, tokenizer)]


def _grades(
    grader: Grader, prompts: Sequence[Prompt], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[Grade]:
    if not prompts:
        return []
    names = dict.fromkeys(name for prompt in prompts for name in prompt.columns if name not in _POSITIONAL)
    columns = {name: [prompt.columns.get(name) for prompt in prompts] for name in names}
    columns["answer"] = [prompt.answer for prompt in prompts]
    texts = [str(tokenizer.decode(list(prompt.token_ids))) for prompt in prompts]
    try:
        with _ONE_AT_A_TIME:
            scores = grader(texts, list(completions), **columns)
    except Exception as error:
        error.add_note(f"raised by grader '{_name(grader)}'")
        raise
    return _check_scores(scores, grader, prompts)


def check_answers(
    grader: Grader, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase, limit: int = 200
) -> None:
    """Refuse a data set whose answers the grader does not accept as completions; looks at `limit` evenly spread."""
    sample = [prompts[number * len(prompts) // limit] for number in range(limit)] if len(prompts) > limit else prompts
    scores = grade_texts(grader, sample, [prompt.answer or "" for prompt in sample], tokenizer)
    wrong = [prompt for prompt, score in zip(sample, scores, strict=True) if score < 1]
    if wrong:
        raise DataError(
            f"grader '{_name(grader)}' gives {len(wrong)} of {len(sample)} answers less than 1 when they are the "
            f"completion itself, first prompt '{wrong[0].id}' with {wrong[0].answer!r}. Use a grader that reads them."
        )


def _check_scores(scores: Any, grader: Grader, prompts: Sequence[Prompt]) -> list[Grade]:
    name = _name(grader)
    scores = scores.tolist() if hasattr(scores, "tolist") else scores
    if not isinstance(scores, list | tuple):
        raise DataError(f"grader '{name}' returned a {type(scores).__name__}. Return a list of {len(prompts)} numbers.")
    if len(scores) != len(prompts):
        raise DataError(f"grader '{name}' returned {len(scores)} scores for {len(prompts)} completions.")
    says = any(grader is own for own in GRADERS.values())
    found = []
    for score, prompt in zip(scores, prompts, strict=True):
        reward, words = (score.reward, score.words) if isinstance(score, Grade) else (score, None)
        if not isinstance(reward, Real) or not isfinite(reward):
            raise DataError(f"grader '{name}' scored an answer to '{prompt.id}' {score!r}. Return finite numbers.")
        if not isinstance(words, str | None):
            raise DataError(f"grader '{name}' said {words!r} of an answer to '{prompt.id}'. Say a text, or None.")
        found.append(Grade(reward=float(reward), words=_verdict(float(reward)) if says else words))
    return found


def _verdict(reward: float) -> str:
    """The words of a grader that gives only a number from 0 to 1."""
    if 0 < reward < 1:
        return f"The answer is partly right: {reward:.2g} of 1."
    return "The answer is right." if reward >= 1 else "The answer is wrong."


def _name(grader: Grader) -> str:
    known = (name for name, each in GRADERS.items() if each is grader)
    return next(known, None) or getattr(grader, "__name__", type(grader).__name__)


def _pairs(name: str, completions: Sequence[Any], columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each completion's final text with what it should be."""
    answers = columns.get("answer")
    if answers is None:
        raise DataError(f"grader '{name}' compares with the column 'answer', which is missing. Set data.answer_column.")
    if None in answers or "" in answers:
        number = next(number for number, answer in enumerate(answers) if answer is None or answer == "")
        raise DataError(
            f"grader '{name}' has no answer to compare completion {number} of {len(answers)} with. "
            "Fill data.answer_column in every row, or drop the rows without."
        )
    return [(final_text(_text_of(c)), final_text(str(a))) for c, a in zip(completions, answers, strict=True)]


def _text_of(completion: Any) -> str:
    if isinstance(completion, str):
        return completion
    return "\n".join(message.content for message in parse_messages(completion) if message.role == "assistant")
