"""Chunks: the shortest pieces of a text that both tokenizers cut at both ends; credit crosses by them (2606.09456).

    student   |Hel|lo| wor|ld|!|        L_S = sum of log pi_S over the student's tokens of a chunk
    teacher   |Hello| world|!|          L_T = sum of log pi_T over the teacher's tokens of the chunk
    chunks    |Hello| world|!|

Each of the student's tokens gets a log-probability of the teacher such that the sum over the chunk is L_T:

    proportional   log pi_T(y_i) = log pi_S(y_i) * L_T / L_S      the student's own surprise says where it belongs
    additive       log pi_T(y_i) = log pi_S(y_i) + (L_T - L_S) / m   all m tokens of the chunk gain or lose alike
    uniform        log pi_T(y_i) = L_T / m

A log-probability is never above 0: where the additive one would be, it is 0, and the other tokens share what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.bridge.spelling import BROKEN, Spelled

Credit = Literal["proportional", "additive", "uniform"]
_SURE = 1e-8
"""Nats of a chunk below which there are no shares to speak of."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of each side that write the same characters."""

    student: tuple[int, int]
    teacher: tuple[int, int]
    text: str

    @property
    def sizes(self) -> tuple[int, int]:
        return self.student[1] - self.student[0], self.teacher[1] - self.teacher[0]

    def moved(self, student: int, teacher: int) -> Chunk:
        """Behind so many tokens of each side."""
        own, theirs = self.student, self.teacher
        return Chunk((own[0] + student, own[1] + student), (theirs[0] + teacher, theirs[1] + teacher), self.text)

    @property
    def is_single(self) -> bool:
        """One token on each side."""
        return self.sizes == (1, 1)


def chunks_of(student: Spelled, teacher: Spelled) -> list[Chunk]:
    """Both cuts of one text, taken together.  Tokens that write nothing belong to what comes after them."""
    assert student.text == teacher.text
    theirs = {end: n + 1 for n, end in enumerate(teacher.ends) if end is not None}  # the last token that ends there
    found, at, start = list[Chunk](), (0, 0), 0
    for n, end in enumerate(student.ends):
        last = n + 1 == len(student.ends)
        if end is None or end not in theirs or theirs[end] <= at[1] or not (last or end > start):
            continue
        if not last and student.ends[n + 1] == end:
            continue  # another token that writes nothing follows
        found.append(Chunk((at[0], n + 1), (at[1], theirs[end]), student.text[start:end]))
        at, start = (n + 1, theirs[end]), end
    return found


def is_read(chunk: Chunk, teacher: Spelled, longest: int, unknown: int | None) -> bool:
    """Whether what the teacher says of a chunk is about the student's words: a chunk that is too long, that holds bytes
    that are no characters, or words that the teacher has no token for, carries no signal."""
    ids = teacher.token_ids[slice(*chunk.teacher)]
    return max(chunk.sizes) <= longest and BROKEN not in chunk.text and (unknown is None or unknown not in ids)


def credited(
    chunks: Sequence[Chunk], teacher_T: Tensor, student_T: Tensor | None, num_tokens: int, credit: Credit, most: float
) -> tuple[Tensor, Tensor]:
    """For each of the student's tokens the teacher's log-probability, and whether a chunk brought one.

    `most`: by how many nats the teacher's may differ from the student's, where that is known."""
    logprobs_T = torch.zeros(num_tokens, dtype=torch.float32)
    read_T = torch.zeros(num_tokens, dtype=torch.bool)
    for chunk in chunks:
        own = slice(*chunk.student)
        total = teacher_T[slice(*chunk.teacher)].double().sum()
        theirs = total.expand(chunk.sizes[0]) / chunk.sizes[0]
        if student_T is not None:
            spent = student_T[own].double().clamp_max(0.0)
            if credit == "additive":
                theirs = _nearest(spent, total)
            elif credit == "proportional" and float(-spent.sum()) > _SURE:
                theirs = total * (spent / spent.sum())
            theirs = theirs.clamp(spent - most, spent + most).clamp_max(0.0)
        logprobs_T[own], read_T[own] = theirs.float(), True
    return logprobs_T, read_T


def _nearest(spent_M: Tensor, total: Tensor) -> Tensor:
    """The log-probabilities with this sum that are nearest to the student's, by least squares."""
    free_M = torch.ones_like(spent_M, dtype=torch.bool)
    while True:
        near_M = torch.where(free_M, spent_M + (total - spent_M[free_M].sum()) / free_M.sum(), 0.0)
        if not bool((above_M := near_M > 0).any()):
            return near_M
        free_M &= ~above_M
