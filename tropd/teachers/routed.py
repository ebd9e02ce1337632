"""Several teachers, each for its own prompts: `prompt.teacher` names the one that scores it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

from torch import Tensor, cat, tensor

from tropd.errors import ConfigError, DataError
from tropd.objective.evidence import Needs
from tropd.teachers.teacher import RunTeacher, TopKRows
from tropd.types import Rollout, TeacherScores


class Routed:
    """Gives what all of its teachers give.

    Example: Routed({"math": LocalTeacher(a), "code": ServerTeacher(...)}) with data.teacher_column naming the column.
    """

    def __init__(self, teachers: Mapping[str, RunTeacher]) -> None:
        if not teachers:
            raise ConfigError("several teachers were asked for, but none was given. Give at least one.")
        self.teachers = dict(teachers)
        self.capabilities: Needs = reduce(Needs.__and__, (teacher.capabilities for teacher in teachers.values()))

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
        """One TeacherScores per rollout, in order."""
        unknown = sorted({rollout.prompt.teacher for rollout in rollouts} - set(self.teachers))
        if unknown:
            raise DataError(
                f"prompts ask for the teachers {', '.join(map(repr, unknown))}, but there are only "
                f"{', '.join(map(repr, self.teachers))}. Correct the data set's teacher column, or add them."
            )
        starts = tensor([0, *(len(rollout.response_ids) for rollout in rollouts)]).cumsum(0).tolist()
        scores: dict[int, TeacherScores] = {}
        for name, teacher in self.teachers.items():
            chosen = [index for index, rollout in enumerate(rollouts) if rollout.prompt.teacher == name]
            if not chosen:
                continue
            rows_N = cat([tensor(range(starts[i], starts[i + 1]), dtype=int) for i in chosen])  # type: ignore[arg-type]
            found = teacher.score(
                [rollouts[i] for i in chosen],
                needs,
                top_k=top_k,
                student_topk_ids_TJ=None if student_topk_ids_TJ is None else [student_topk_ids_TJ[i] for i in chosen],
                top_k_rows=None if top_k_rows is None else _within(top_k_rows, rows_N),
            )
            scores.update(zip(chosen, found, strict=True))
        return [scores[index] for index in range(len(rollouts))]


def _within(top_k_rows: TopKRows, rows_N: Tensor) -> TopKRows:
    """The same question about the rows of some of the rollouts."""
    return lambda rows_C, logprobs_C: top_k_rows(rows_N.to(rows_C.device)[rows_C], logprobs_C)
