"""What a term may read: the tokens of a batch with everything known about them, and the student's view of them.

Axis legend and alignment rule: `tropd.types`.  Rows are flat: sequences lie one after another, nothing is padded, and
entry n of every *_N field describes token_ids_N[n] itself.

`Tokens` is what is known before the gradient pass and carries no gradient.  `StudentView` is the only object with one.
Reading a field that was not supplied is an EvidenceError that names it, so a piece cannot use what it did not declare.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Flag, auto
from typing import Any, Self, cast

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.types import Author


class Needs(Flag):
    """Evidence that a piece reads.  Compared with the teacher's capabilities before step 0."""

    NOTHING = 0
    SAMPLED = auto()
    """log pi_T of the token that was written."""
    TOPK = auto()
    """The teacher's k likeliest tokens with their log-probabilities, and the student's log-probabilities there."""
    STUDENT_TOPK = auto()
    """The student's k likeliest tokens, and the teacher's log-probabilities there."""
    FULL = auto()
    """Both whole next-token distributions.  Nothing else builds [tokens, vocabulary]."""
    HIDDEN = auto()
    """The teacher's last hidden states: with the teacher's head, FULL is computed from them a tile at a time."""
    TEACHER_ENTROPY = auto()
    STUDENT_ENTROPY = auto()
    REVERSE_KL = auto()
    """KL(student || teacher) over the whole vocabulary at each token, as a number without gradient."""
    REWARD = auto()
    """A grader's number for each sequence."""


OF_TEACHER = (
    Needs.SAMPLED
    | Needs.TOPK
    | Needs.STUDENT_TOPK
    | Needs.FULL
    | Needs.HIDDEN
    | Needs.TEACHER_ENTROPY
    | Needs.REVERSE_KL
)
"""The part of Needs that only a teacher can answer."""

ABSENT = cast(Tensor, None)

_SOURCE = {
    "teacher_logprobs_N": Needs.SAMPLED,
    "teacher_topk_ids_NK": Needs.TOPK,
    "teacher_topk_logprobs_NK": Needs.TOPK,
    "topk_logprobs_NK": Needs.TOPK,
    "student_topk_ids_NJ": Needs.STUDENT_TOPK,
    "teacher_at_student_topk_NJ": Needs.STUDENT_TOPK,
    "student_topk_logprobs_NJ": Needs.STUDENT_TOPK,
    "teacher_full_logprobs_NV": Needs.FULL,
    "full_logprobs_NV": Needs.FULL,
    "teacher_hidden_NH": Needs.HIDDEN,
    "teacher_entropy_N": Needs.TEACHER_ENTROPY,
    "student_entropy_N": Needs.STUDENT_ENTROPY,
    "reverse_kl_N": Needs.REVERSE_KL,
    "rewards_S": Needs.REWARD,
}


class Evidence:
    """A frozen record of tensors whose absent fields cannot be read, only `peek`ed at."""

    __slots__ = ()

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and not name.startswith("__"):
            needs = _SOURCE.get(name)
            declare = f"; the piece that reads it must declare Needs.{needs.name}" if needs else ""
            raise EvidenceError(f"evidence `{name}` was read, but it was not supplied{declare}.")
        return value

    def peek(self, name: str) -> Tensor | None:
        """The field, or None where it is absent."""
        return object.__getattribute__(self, name)

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        kept = {f.name: self.peek(f.name) for f in fields(cast(Any, self))}
        return type(self)(**{**kept, **changes})

    def rows(self, index: Tensor | slice) -> Self:
        """The same record for some of its tokens.  Per-sequence fields stay whole: `sequences_N` points into them."""
        changes = {}
        for f in fields(cast(Any, self)):
            value = self.peek(f.name)
            if value is not None and "_N" in f.name:
                changes[f.name] = value[index]
        return self.with_(**changes)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Tokens(Evidence):
    """What is known about each token before the gradient pass.  No gradient anywhere."""

    token_ids_N: Tensor
    authors_N: Tensor
    sequences_N: Tensor
    """Which sequence, as an index into the *_S fields."""
    positions_N: Tensor
    """0 for the first token of the response."""
    keys_S: Tensor
    """Random key of each sequence (int64): with `positions_N` it names the token's random numbers."""
    num_actions_S: Tensor
    """Tokens of each sequence that can be trained on, in the whole batch."""
    num_before_N: Tensor = ABSENT
    """How many tokens of its sequence by the same author come before it, in the whole batch."""
    num_after_N: Tensor = ABSENT
    """How many come after it."""
    behavior_logprobs_N: Tensor = ABSENT
    """log-probability under the distribution that the token was sampled from."""
    student_logprobs_N: Tensor = ABSENT
    """The student's own log-probability when the batch was planned."""
    teacher_logprobs_N: Tensor = ABSENT
    teacher_topk_ids_NK: Tensor = ABSENT
    teacher_topk_logprobs_NK: Tensor = ABSENT
    """In the teacher's order, likeliest first."""
    student_topk_ids_NJ: Tensor = ABSENT
    teacher_at_student_topk_NJ: Tensor = ABSENT
    teacher_full_logprobs_NV: Tensor = ABSENT
    teacher_hidden_NH: Tensor = ABSENT
    teacher_entropy_N: Tensor = ABSENT
    student_entropy_N: Tensor = ABSENT
    reverse_kl_N: Tensor = ABSENT
    rewards_S: Tensor = ABSENT
    groups_S: Tensor = ABSENT
    """Sequences with the same number answer the same prompt."""
    vocab_size: int = cast(int, None)
    """0 when unknown is not accepted: leave it out."""

    def __len__(self) -> int:
        return self.token_ids_N.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """In which weights and rewards are computed: that of the log-probabilities, float32 at least."""
        for name in ("student_logprobs_N", "behavior_logprobs_N", "teacher_logprobs_N"):
            given = self.peek(name)
            if given is not None:
                return torch.promote_types(given.dtype, torch.float32)
        return torch.float32

    @property
    def log_ratio_N(self) -> Tensor:
        """log pi_T - log pi_S of the written token, as of planning."""
        return at_least_float32(self.teacher_logprobs_N) - at_least_float32(self.student_logprobs_N)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class StudentView(Evidence):
    """The student's current log-probabilities of the same tokens.  Carries the gradient."""

    logprobs_N: Tensor
    topk_logprobs_NK: Tensor = ABSENT
    """At Tokens.teacher_topk_ids_NK."""
    student_topk_logprobs_NJ: Tensor = ABSENT
    """At Tokens.student_topk_ids_NJ."""
    full_logprobs_NV: Tensor = ABSENT


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision loses the sign of small log-ratios, so the objective never computes in it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def trained(tokens: Tokens) -> Tensor:
    """Which tokens can be trained on: those that the student or the teacher wrote."""
    return (tokens.authors_N == Author.STUDENT) | (tokens.authors_N == Author.TEACHER)


def around(sequences_N: Tensor, authors_N: Tensor) -> tuple[Tensor, Tensor]:
    """(num_before_N, num_after_N): the tokens of each sequence stand in their order."""
    group_N = len(Author) * sequences_N + torch.where(authors_N < len(Author), authors_N, 0).clamp_min(0)
    order = torch.argsort(group_N, stable=True)
    size = torch.bincount(group_N)
    start = size.cumsum(0) - size
    num_before_N = torch.empty_like(group_N)
    num_before_N[order] = torch.arange(len(order), device=order.device) - start[group_N[order]]
    return num_before_N, size[group_N] - 1 - num_before_N
