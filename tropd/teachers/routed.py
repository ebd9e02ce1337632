"""Several teachers, each for its own prompts: `prompt.teacher` names the one that scores it and writes for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial, reduce
from typing import Any, TypeVar

from torch import Tensor, cat, tensor

from tropd.base.background import in_background
from tropd.errors import ConfigError, DataError, EvidenceError
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.rollout.engine import Engine
from tropd.teachers.teacher import RunTeacher, Teacher, TopKRows
from tropd.types import Completion, Request, Rollout, TeacherScores

T = TypeVar("T", bound=Teacher)


class Routed:
    """Gives what all of its teachers give, but hidden states: only the head that they belong to can read them.

    Example: Routed({"math": LocalTeacher(a), "code": ServerTeacher(...)}) with data.teacher_column naming the column.
    """

    def __init__(self, teachers: Mapping[str, RunTeacher]) -> None:
        if not teachers:
            raise ConfigError("several teachers were asked for, but none was given. Give at least one.")
        self.teachers = dict(teachers)
        self.capabilities = shared_by(teacher.capabilities for teacher in teachers.values())

    @property
    def context(self) -> int | None:
        known = [teacher.context for teacher in self.teachers.values() if teacher.context is not None]
        return min(known, default=None)

    @property
    def noise(self) -> float:
        return max(teacher.noise for teacher in self.teachers.values())

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order.  Teachers elsewhere are asked at once, those of this process in
        turn."""
        if beyond := needs & OF_TEACHER & ~self.capabilities:
            raise EvidenceError(f"{beyond} was asked of several teachers, which together give {self.capabilities}.")
        starts = tensor([0, *(len(rollout.response_ids) for rollout in rollouts)]).cumsum(0).tolist()

        def ask(name: str, chosen: list[int]) -> dict[int, TeacherScores]:
            rows_N = cat([tensor(range(starts[i], starts[i + 1]), dtype=int) for i in chosen])  # type: ignore[arg-type]
            found = self.teachers[name].score(
                [rollouts[i] for i in chosen],
                needs,
                top_k=top_k,
                student_topk_ids_TJ=None if student_topk_ids_TJ is None else [student_topk_ids_TJ[i] for i in chosen],
                top_k_rows=None if top_k_rows is None else _within(top_k_rows, rows_N),
            )
            return dict(zip(chosen, found, strict=True))

        shares = _shares(self.teachers, [rollout.prompt.teacher for rollout in rollouts])
        scores: dict[int, TeacherScores] = {}
        away = [in_background(partial(ask, *share)) for share in shares.items() if not self._is_here(share[0])]
        for share in shares.items():
            if self._is_here(share[0]):
                scores.update(ask(*share))
        for answer in away:
            scores.update(answer.result())
        return [scores[index] for index in range(len(rollouts))]

    def _is_here(self, name: str) -> bool:
        return hasattr(self.teachers[name], "forward")

    def alone(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], RunTeacher]]:
        """Which rollouts are whose."""
        shares = _shares(self.teachers, [rollout.prompt.teacher for rollout in rollouts])
        return [(chosen, self.teachers[name]) for name, chosen in shares.items()]


def shared_by(capabilities: Iterable[Needs]) -> Needs:
    """What several teachers offer together."""
    return reduce(Needs.__and__, capabilities) & ~Needs.HIDDEN


class RoutedWriter:
    """An engine that has each text written by the teacher whose name its request bears."""

    def __init__(self, writers: Mapping[str, Engine]) -> None:
        self.writers = dict(writers)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        texts: dict[int, Completion] = {}
        for name, chosen in _shares(self.writers, [request.teacher for request in requests]).items():
            texts.update(zip(chosen, self.writers[name].generate([requests[i] for i in chosen]), strict=True))
        return [texts[index] for index in range(len(requests))]

    def sync(self, version: int) -> None:
        """Teachers do not change."""

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


def by_name(teacher: RunTeacher) -> dict[str, RunTeacher]:
    """A run's teacher as single ones, by the names that prompts have for them."""
    return teacher.teachers if isinstance(teacher, Routed) else {"default": teacher}


def by_teacher(teacher: T, rollouts: Sequence[Rollout]) -> list[tuple[list[int], T]]:
    """A teacher as single ones, each with the numbers of its rollouts."""
    if isinstance(teacher, Routed):
        whole: Any = teacher.alone(rollouts)
        return whole
    return [(list(range(len(rollouts))), teacher)]


def _shares(known: Mapping[str, object], names: Sequence[str]) -> dict[str, list[int]]:
    """By name, in the order in which they are known: the places where it stands."""
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise DataError(
            f"prompts ask for the teachers {', '.join(map(repr, unknown))}, but there are only "
            f"{', '.join(map(repr, known))}. Correct the data set's teacher column, or add them."
        )
    places = {name: [index for index, asked in enumerate(names) if asked == name] for name in known}
    return {name: chosen for name, chosen in places.items() if chosen}


def _within(top_k_rows: TopKRows, rows_N: Tensor) -> TopKRows:
    """The same question about the rows of some of the rollouts."""
    return lambda rows_C, logprobs_C: top_k_rows(rows_N.to(rows_C.device)[rows_C], logprobs_C)
