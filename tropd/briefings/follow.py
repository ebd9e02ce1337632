"""How a teacher that was the student at the start follows it: plain data, `follow` in the section of a teacher.

    frozen   never
    ema      an average of the student's weights over the steps
    copy     the student itself, every so many steps
    gated    the student itself, once its answers are better and not too long

A teacher moves after a step's update, so the next step reads with what it has become.  `tropd.teachers.following` moves
the weights; here is when.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from tropd.base.names import made
from tropd.base.ranges import Count, NotNegative, Ranged, Share
from tropd.base.reading import nearest
from tropd.errors import ConfigError

if TYPE_CHECKING:  # which needs torch, and a run file does not
    from tropd.objective.memory import Memory


@dataclass(frozen=True, kw_only=True)
class Answers:
    """The answers of a step, of all ranks in the same order, without those that a horizon cut."""

    rewards: Sequence[float]
    lengths: Sequence[int]
    cut: Sequence[bool]
    """Whether an answer was cut at rollout.max_new_tokens."""

    @property
    def reward(self) -> float:
        """The mean."""
        return math.fsum(self.rewards) / len(self.rewards)

    @property
    def tail(self) -> float:
        """The length that 95 % of the answers do not exceed."""
        return float(sorted(self.lengths)[math.ceil(0.95 * len(self.lengths)) - 1])

    @property
    def clipped(self) -> float:
        """The share that was cut."""
        return sum(self.cut) / len(self.cut)


@dataclass(frozen=True, kw_only=True)
class Follow(Ranged):
    """When a teacher moves, and how far."""

    rule: str
    section: ClassVar[str] = "teacher.follow"
    reads_answers: ClassVar[bool] = False
    """Whether `moves` reads the answers of a step, and with them a grader's reward."""
    averages: ClassVar[bool] = False
    """Whether the teacher is an average, which half precision could not hold."""

    @property
    def share(self) -> float:
        """The share of the student in what the teacher becomes when it moves."""
        return 1.0

    def moves(self, step: int, answers: Answers | None, memory: Memory, name: str) -> bool:
        """Whether teacher `name` moves after this step, counted from 0.  Called once a step, on all ranks alike."""
        return False

    def age(self, step: int, memory: Memory, name: str) -> int:
        """Steps between the last move, or the start, and the beginning of this step."""
        return step


@dataclass(frozen=True, kw_only=True)
class Frozen(Follow):
    """Never: it stays the student before training."""

    rule: Literal["frozen"] = "frozen"


@dataclass(frozen=True, kw_only=True)
class _Clocked(Follow):
    every: Count = 1
    """Steps from one move to the next. At least 1."""

    def moves(self, step: int, answers: Answers | None, memory: Memory, name: str) -> bool:
        return (step + 1) % self.every == 0

    def age(self, step: int, memory: Memory, name: str) -> int:
        return step % self.every


@dataclass(frozen=True, kw_only=True)
class Ema(_Clocked):
    """An exponential moving average: teacher <- decay * teacher + (1 - decay) * student."""

    rule: Literal["ema"] = "ema"
    decay: Share = 0.999
    """(OPSD: 0.999; UniSD: 0.98 with every = 10) 0 is the student itself, 1 the student before training. In [0, 1]."""
    averages: ClassVar[bool] = True

    @property
    def share(self) -> float:
        return 1 - self.decay


@dataclass(frozen=True, kw_only=True)
class Copy(_Clocked):
    """The student itself, every so many steps; in between the teacher stands still."""

    rule: Literal["copy"] = "copy"


@dataclass(frozen=True, kw_only=True)
class Gated(Follow):
    """CGTR (arXiv:2606.03532): the student itself, if enough steps have passed, the reward has risen since the last
    copy, and answers have become neither long nor cut.  The paper gives no thresholds; these are inferred."""

    rule: Literal["gated"] = "gated"
    min_steps: Count = 20
    """[inferred] Steps from one copy to the next, at the least. At least 1."""
    rise: NotNegative = 0.01
    """[inferred] By how much the average of the reward must have risen since the last copy. At least 0."""
    smoothing: Share = 0.9
    """[inferred] The share of the average that a step keeps: reward <- smoothing * reward + (1 - smoothing) * mean of
    the step. In [0, 1]."""
    tail: NotNegative = 0.2
    """[inferred] The length that 95 % of the answers stay within may be (1 + tail) times that at the last copy. At
    least 0."""
    clipped: Share = 0.1
    """[inferred] The share of answers that may be cut at rollout.max_new_tokens. In [0, 1]."""
    reads_answers: ClassVar[bool] = True

    def moves(self, step: int, answers: Answers | None, memory: Memory, name: str) -> bool:
        if answers is None:  # a horizon cut each of them, so there is nothing to go by
            return False
        first = f"{name}/steps" not in memory
        reward = answers.reward if first else self._averaged(answers.reward, float(memory[f"{name}/reward"]))
        memory.put(f"{name}/reward", reward)
        if first:  # the student before training wrote the answers of the first step
            self._note(memory, name, 0, reward, answers.tail)
        opens = (
            step + 1 - int(memory[f"{name}/steps"]) >= self.min_steps
            and reward >= float(memory[f"{name}/reward_at_copy"]) + self.rise
            and answers.tail <= (1 + self.tail) * float(memory[f"{name}/tail_at_copy"])
            and answers.clipped <= self.clipped
        )
        if opens:
            self._note(memory, name, step + 1, reward, answers.tail)
        return opens

    def age(self, step: int, memory: Memory, name: str) -> int:
        return step - (int(memory[f"{name}/steps"]) if f"{name}/steps" in memory else 0)

    def _averaged(self, now: float, before: float) -> float:
        return self.smoothing * before + (1 - self.smoothing) * now

    @staticmethod
    def _note(memory: Memory, name: str, steps: int, reward: float, tail: float) -> None:
        memory.put(f"{name}/steps", steps)
        memory.put(f"{name}/reward_at_copy", reward)
        memory.put(f"{name}/tail_at_copy", tail)


RULES: dict[str, type[Follow]] = {"frozen": Frozen, "ema": Ema, "copy": Copy, "gated": Gated}


def read_follow(value: Any) -> Follow:
    """From a table of a run file, from the name of a rule, or one made in Python."""
    if isinstance(value, Follow):
        return value
    table = {"rule": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping) or not isinstance(table.get("rule"), str):
        raise ConfigError(
            f"teacher.follow is {value!r}, but it is a table with its rule, such as {{ rule = 'ema', decay = 0.999 }}."
        )
    rule = table["rule"]
    if rule not in RULES:
        raise ConfigError(
            f"there is no rule {rule!r} to follow by{nearest(rule, RULES)}; there are {', '.join(RULES)}."
        )
    return made(RULES[rule], {name: x for name, x in table.items() if name != "rule"}, f"follow {rule!r}")
