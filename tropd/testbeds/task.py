"""The parts of a testbed: a task that writes its own texts, models, and their training.

A task draws problems from a random stream and writes answers in several styles; each style is a dialect that a model
can be trained to.  Text is a list of words; every word is one token.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from tropd.errors import ConfigError

Word = tuple[str, bool]
"""A word of an answer, and whether a model learns to write it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    question: tuple[str, ...]
    answer: tuple[str, ...]
    """A right text ends in these words, and no wrong one does."""
    givens: Any = None
    """The data from which the task writes solutions."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Columns for the grader besides the answer."""


class Task(Protocol):
    """Problems, and texts that solve them."""

    @property
    def words(self) -> tuple[str, ...]:
        """Every word there is, in the order of the vocabulary."""
        ...

    @property
    def space(self) -> str:
        """The separator between two words."""
        ...

    @property
    def grader(self) -> str:
        """The name of the grader, see tropd.data.graders."""
        ...

    def parts(self, word: str) -> tuple[str, ...]:
        """The parts of a word: words that share a part start with similar embeddings.  () for a word without parts."""
        ...

    def problem(self, rng: random.Random) -> Problem: ...

    def write(self, rng: random.Random, problem: Problem, style: Any) -> list[Word]:
        """A solution in a style of this task, right or wrong as the style says."""
        ...


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a small Llama model, with separate head and embedding."""

    width: int = 64
    layers: int = 2
    heads: int = 4
    hidden: int = 128
    """Width of the feed-forward layers."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """Supervised training on texts of the task: AdamW, a warm-up, then half a cosine down to a twentieth."""

    steps: int
    learning_rate: float
    mix: tuple[tuple[float, Any], ...]
    """Shares and styles."""
    batch: int = 64
    warmup: int = 50
    weight_decay: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Lesson(Training):
    """Training on other problems with the same words, for instance shorter ones."""

    task: Task


@dataclass(frozen=True, kw_only=True)
class Testbed:
    """A task, a teacher that solves it, and a student that has the skill but writes differently."""

    __test__ = False  # not a case of pytest

    name: str
    task: Task
    teacher: Shape = field(default_factory=Shape)
    teacher_training: tuple[Training, ...]
    teacher_accuracy: float = 0.9
    """Learning starts suddenly, and from some initial weights never: below this accuracy training is tried again."""
    student: Shape | None = None
    """None: the student starts as a copy of the teacher."""
    student_training: tuple[Training, ...]
    """The last training moves the student to another dialect."""
    max_new_tokens: int
    num_train: int = 512
    num_held_out: int = 256
    num_prompts: int = 32
    """Suggested for a distillation run: prompts per step."""
    steps: int = 40
    """Suggested for a distillation run."""
    learning_rate: float = 3e-4
    """Suggested for a distillation run."""
    others: Mapping[str, Task] = field(default_factory=dict, repr=False)
    """More teachers by name, and the task in the words of each, which makes its tokenizer."""
    facts: Mapping[str, float] = field(default_factory=dict)
    """Measured at seed 0, for comparison."""

    def __post_init__(self) -> None:
        if not self.teacher_training or not self.student_training:
            raise ConfigError(f"testbed '{self.name}' trains no teacher or no student. Give both a schedule.")
