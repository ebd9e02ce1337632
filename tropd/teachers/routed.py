"""Several teachers, each for its own prompts: `prompt.teacher` names the one that scores it and writes for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import TYPE_CHECKING

import torch

from tropd.base.background import in_background
from tropd.config.run import Run
from tropd.errors import ConfigError, DataError
from tropd.methods.decoding import Decoding
from tropd.objective.evidence import Needs
from tropd.rollout.engine import Engine
from tropd.rollout.stage import Pair
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.types import Completion, Prompt, Request, Rollout, TeacherScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Routed(Teacher):
    """Gives what all of its teachers give, except hidden states, which only their own head can read.

    Example: Routed({"math": LocalTeacher(a), "code": ServerTeacher(...)}) with data.teacher_column naming the column.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        if not teachers:
            raise ConfigError("several teachers were asked for, but none was given. Give at least one.")
        self._teachers = dict(teachers)
        each = self._teachers.values()
        self.name = ", ".join(teachers)
        self.capabilities = shared_by(teacher.capabilities for teacher in each)
        self.context = min((teacher.context for teacher in each if teacher.context is not None), default=None)
        self.noise = max(teacher.noise for teacher in each)
        self.elsewhere = all(teacher.elsewhere for teacher in each)

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        return self._teachers

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """Scores with teachers on other machines at the same time, with those of this process in turn."""
        request.check(self)
        scores: dict[int, TeacherScores] = {}
        shares = self.parts(request.rollouts)
        away = [
            (chosen, in_background(partial(teacher.score, request.take(chosen))))
            for chosen, teacher in shares
            if teacher.elsewhere
        ]
        for chosen, teacher in shares:
            if not teacher.elsewhere:
                scores.update(zip(chosen, teacher.score(request.take(chosen)), strict=True))
        for chosen, answer in away:
            scores.update(zip(chosen, answer.result(), strict=True))
        return [scores[index] for index in range(len(request.rollouts))]

    def parts(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], Teacher]]:
        shares = _shares(self._teachers, [rollout.prompt.teacher for rollout in rollouts])
        return [(chosen, self._teachers[name]) for name, chosen in shares.items()]

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        for teacher in self._teachers.values():
            teacher.prepare(tokenizer, vocab_size, device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        with ExitStack() as stack:
            for teacher in self._teachers.values():
                stack.enter_context(teacher.whole())
            yield

    def close(self) -> None:
        with ExitStack() as stack:  # closes everything, even where closing fails
            for teacher in self._teachers.values():
                stack.callback(teacher.close)


def shared_by(capabilities: Iterable[Needs]) -> Needs:
    """The evidence that all of several teachers offer."""
    return reduce(Needs.__and__, capabilities) & ~Needs.HIDDEN


class RoutedWriter(Engine):
    """An engine that passes each request to the teacher that it names."""

    def __init__(self, writers: Mapping[str, Engine]) -> None:
        self.writers = dict(writers)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        texts: dict[int, Completion] = {}
        for name, chosen in _shares(self.writers, [request.teacher for request in requests]).items():
            texts.update(zip(chosen, self.writers[name].generate([requests[i] for i in chosen]), strict=True))
        return [texts[index] for index in range(len(requests))]

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class RoutedPair:
    """Each text is written by the student with the teacher that its request names."""

    def __init__(self, pairs: Mapping[str, Pair]) -> None:
        self.pairs = dict(pairs)

    def write(
        self, requests: Sequence[Request], told: Sequence[tuple[int, ...]], decoding: Decoding
    ) -> list[Completion]:
        texts: dict[int, Completion] = {}
        for name, chosen in _shares(self.pairs, [request.teacher for request in requests]).items():
            mine = self.pairs[name].write([requests[i] for i in chosen], [told[i] for i in chosen], decoding)
            texts.update(zip(chosen, mine, strict=True))
        return [texts[index] for index in range(len(requests))]


def _shares(known: Mapping[str, object], names: Sequence[str]) -> dict[str, list[int]]:
    """For each name, in the order of the teachers: the indices at which it occurs."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise DataError(
            f"prompts ask for the teachers {', '.join(map(repr, unknown))}, but there are only "
            f"{', '.join(map(repr, known))}. Correct the data set's teacher column, or add them."
        )
    places = {name: [index for index, wanted in enumerate(names) if wanted == name] for name in known}
    return {name: chosen for name, chosen in places.items() if chosen}


def share_prompts(run: Run, prompts: Sequence[Prompt]) -> dict[str, int]:
    """Count the prompts of each teacher; prompts for an unknown teacher are refused."""
    number = Counter(prompt.teacher for prompt in prompts)
    if unknown := [name for name in number if name not in run.all_teachers]:
        shown = ", ".join(f"{name!r} ({number[name]})" for name in unknown[:8])
        raise DataError(
            f"{sum(number[name] for name in unknown)} of {len(prompts)} prompts are for teachers that the run does "
            f"not have: {shown}. It has {', '.join(map(repr, run.all_teachers))}. Correct the column "
            f"{run.data.teacher_column!r} of {run.data.path}, or add a section [teachers.NAME] for each."
        )
    return {name: number[name] for name in run.all_teachers}
