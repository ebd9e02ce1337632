"""What a term may read: the tokens of a batch with everything known about them, and the student's view of them.

Axis legend and alignment rule: `tropd.types`.  Rows are flat: sequences lie one after another, nothing is padded, and
entry n of every *_N field describes token_ids_N[n] itself.

`Tokens` is what is known before the gradient pass and carries no gradient.  `StudentView` is the only object with one.
Reading a field that was not supplied is an EvidenceError that names it, so a piece cannot use what it did not declare.

Several readers may have read the same responses.  The `teacher_*` fields are those of one of them, by default
"teacher"; `of(name)` gives the same record as of another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Flag, auto
from functools import reduce
from operator import or_
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.types import READER, Author


class Needs(Flag):
    """Evidence that a piece reads.  Compared with the teacher's capabilities before step 0."""

    NOTHING = 0
    SAMPLED = auto()
    """log pi_T of the token that was written."""
    TOPK = auto()
    """The teacher's k likeliest tokens with their log-probabilities, and the student's log-probabilities there."""
    STUDENT_TOPK = auto()
    """The student's k likeliest tokens with their log-probabilities, and the teacher's log-probabilities there."""
    STUDENT_AT_TOPK = auto()
    """The student's log-probabilities at the teacher's k likeliest tokens when the batch is planned, for selectors: one
    more pass of the student."""
    FULL = auto()
    """Both whole next-token distributions.  Nothing else builds [tokens, vocabulary]."""
    HIDDEN = auto()
    """The teacher's last hidden states: with the teacher's head, FULL is computed from them a tile at a time."""
    TEACHER_ENTROPY = auto()
    CHUNKS = auto()
    """How much what the teacher writes in place of some chunks resembles them (`tropd.objective.chunks`)."""
    STUDENT_ENTROPY = auto()
    REVERSE_KL = auto()
    """KL(student || teacher) over the whole vocabulary at each token, as a number without gradient."""
    STUDENT_HIDDEN = auto()
    """The student's hidden states, with gradient.  Terms that read them are computed for all tokens at once."""
    REWARD = auto()
    """A grader's number for each sequence."""
    LOOKAHEAD = auto()
    """How sure the teacher would be of the next token after each of some of the student's likeliest tokens: one more
    pass of the teacher, with these tokens as branches of the text."""


OF_TEACHER = ~(Needs.STUDENT_AT_TOPK | Needs.STUDENT_ENTROPY | Needs.STUDENT_HIDDEN | Needs.REWARD)
"""The part of Needs that only a teacher can answer."""
OF_MODEL = OF_TEACHER & ~Needs.CHUNKS
"""What of it a model in this process answers."""


def joined(*asks: Mapping[str, Needs]) -> dict[str, Needs]:
    """Needs by reader, all together."""
    return {name: reduce(or_, (one.get(name, Needs.NOTHING) for one in asks)) for one in asks for name in one}


ABSENT = cast(Tensor, None)

_SOURCE = {
    "teacher_logprobs_N": Needs.SAMPLED,
    "teacher_topk_ids_NK": Needs.TOPK,
    "teacher_topk_logprobs_NK": Needs.TOPK,
    "topk_logprobs_NK": Needs.TOPK,
    "student_topk_ids_NJ": Needs.STUDENT_TOPK,
    "teacher_at_student_topk_NJ": Needs.STUDENT_TOPK,
    "student_topk_logprobs_NJ": Needs.STUDENT_TOPK,
    "student_at_topk_NK": Needs.STUDENT_AT_TOPK,
    "teacher_lookahead_NJ": Needs.LOOKAHEAD,
    "teacher_full_logprobs_NV": Needs.FULL,
    "full_logprobs_NV": Needs.FULL,
    "teacher_hidden_NH": Needs.HIDDEN,
    "teacher_entropy_N": Needs.TEACHER_ENTROPY,
    "teacher_chunks_N": Needs.CHUNKS,
    "teacher_support_N": Needs.CHUNKS,
    "student_entropy_N": Needs.STUDENT_ENTROPY,
    "reverse_kl_N": Needs.REVERSE_KL,
    "hidden_NH": Needs.STUDENT_HIDDEN,
    "rewards_S": Needs.REWARD,
}


class Evidence:
    """A frozen record of tensors whose absent fields cannot be read, only `peek`ed at."""

    __slots__ = ()
    of_reader: ClassVar[tuple[str, ...]] = ()
    """The fields that one of several readers gave."""
    reader: str
    others: Mapping[str, Mapping[str, Any]]

    def __getattribute__(self, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if value is None and not name.startswith("__"):
            needs = _SOURCE.get(name)
            declare = f"; the piece that reads it must declare Needs.{needs.name}" if needs else ""
            whose = "" if self.reader == READER else f" by reader {self.reader!r}"
            raise EvidenceError(f"evidence `{name}` was read, but it was not supplied{whose}{declare}.")
        return value

    def peek(self, name: str) -> Tensor | None:
        """The field, or None where it is absent."""
        return object.__getattribute__(self, name)

    def with_(self, **changes: Any) -> Self:
        """A copy with some fields replaced."""
        kept = {f.name: self.peek(f.name) for f in fields(cast(Any, self))}
        return type(self)(**{**kept, **changes})

    def of(self, reader: str | None) -> Self:
        """The same record as of another reader, whose evidence has the names that the teacher's has."""
        if reader is None or reader == self.reader:
            return self
        others = dict(self.others)
        theirs = others.pop(reader, {})
        others[self.reader] = {name: x for name in self.of_reader if (x := self.peek(name)) is not None}
        return self.with_(reader=reader, others=others, **{name: theirs.get(name) for name in self.of_reader})

    def column(self, name: str) -> Tensor:
        """What there is under this name, a row per token, brought to the device of the tokens."""
        columns = cast("Mapping[str, Tensor]", self.peek("columns")) or {}
        if name not in columns:
            raise EvidenceError(
                f"column {name!r} of reader {self.reader!r} was read, but it was not supplied; the piece that reads it "
                "must name it in `own_columns`, and the teacher in `columns`."
            )
        return columns[name].to(self._first_N.device)

    @property
    def _first_N(self) -> Tensor:
        return getattr(self, fields(cast(Any, self))[0].name)

    def told(self, by: str, **evidence: Any) -> Self:
        """A copy with some evidence of a reader."""
        if by == self.reader:
            return self.with_(**evidence)
        return self.with_(others={**self.others, by: {**self.others.get(by, {}), **evidence}})

    def rows(self, index: Tensor | slice) -> Self:
        """The same record for some of its tokens.  Per-sequence fields stay whole: `sequences_N` points into them."""
        changes = _rows({f.name: self.peek(f.name) for f in fields(cast(Any, self))}, index)
        others = {name: _rows(evidence, index) for name, evidence in self.others.items()}
        return self.with_(**changes, **({"others": others} if others else {}))


def _rows(evidence: Mapping[str, Any], index: Tensor | slice) -> dict[str, Any]:
    """Some rows of what has a row per token; nothing else changes."""
    rows = {name: x[index] for name, x in evidence.items() if x is not None and "_N" in name}
    if columns := evidence.get("columns"):  # which may lie in the host's memory
        rows["columns"] = {
            name: x[index.to(x.device) if isinstance(index, Tensor) else index] for name, x in columns.items()
        }
    return {**{name: x for name, x in evidence.items() if name.endswith("_S") and x is not None}, **rows}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Tokens(Evidence):
    """What is known about each token before the gradient pass.  No gradient anywhere."""

    of_reader: ClassVar[tuple[str, ...]] = (
        *("teacher_logprobs_N", "teacher_topk_ids_NK", "teacher_topk_logprobs_NK", "teacher_at_student_topk_NJ"),
        *("teacher_full_logprobs_NV", "teacher_hidden_NH", "teacher_entropy_N", "reverse_kl_N", "columns"),
        *("student_at_topk_NK", "teacher_lookahead_NJ", "read_S", "read_N", "num_read_S"),
        *("teacher_chunks_N", "teacher_support_N"),
    )

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
    student_topk_logprobs_NJ: Tensor = ABSENT
    """As of planning; with gradient they are in the view."""
    teacher_at_student_topk_NJ: Tensor = ABSENT
    student_at_topk_NK: Tensor = ABSENT
    """The student's log-probabilities at `teacher_topk_ids_NK`, as of planning."""
    teacher_lookahead_NJ: Tensor = ABSENT
    """log max_v pi_T(v | what stands before, candidate), the candidates being the first J of `student_topk_ids_NJ`;
    NOTHING where nobody asked."""
    teacher_full_logprobs_NV: Tensor = ABSENT
    teacher_hidden_NH: Tensor = ABSENT
    teacher_entropy_N: Tensor = ABSENT
    reverse_kl_N: Tensor = ABSENT
    teacher_chunks_N: Tensor = ABSENT
    """n > 0 in the n-th chunk of a response, -n where the teacher was asked and did not answer, 0 elsewhere."""
    teacher_support_N: Tensor = ABSENT
    """How much what the teacher wrote resembles the token's chunk, summed over its continuations; else 0."""
    columns: Mapping[str, Tensor] = cast("Mapping[str, Tensor]", None)
    """What else the teacher says of each token, by name: a row per token."""
    read_S: Tensor = ABSENT
    """Which sequences the teacher read; evidence of the others means nothing; absent: all."""
    read_N: Tensor = ABSENT
    """Which tokens of those the teacher says something of; absent: all."""
    num_read_S: Tensor = ABSENT
    """Of `num_actions_S`, how many are read; there where read_N is."""
    student_entropy_N: Tensor = ABSENT
    rewards_S: Tensor = ABSENT
    groups_S: Tensor = ABSENT
    """Sequences with the same number answer the same prompt."""
    vocab_size: int = cast(int, None)
    """0 when unknown is not accepted: leave it out."""
    reader: str = READER
    """Whose evidence the teacher_* fields hold."""
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """The same fields of other readers."""

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

    of_reader: ClassVar[tuple[str, ...]] = ("topk_logprobs_NK",)

    logprobs_N: Tensor
    topk_logprobs_NK: Tensor = ABSENT
    """At Tokens.teacher_topk_ids_NK."""
    student_topk_logprobs_NJ: Tensor = ABSENT
    """At Tokens.student_topk_ids_NJ."""
    full_logprobs_NV: Tensor = ABSENT
    hidden_NH: Tensor = ABSENT
    """The states that the head reads."""
    columns: Mapping[str, Tensor] = cast("Mapping[str, Tensor]", None)
    """States of several layers [N, L, H], by name (`tropd.objective.hidden`)."""
    reader: str = READER
    """At whose likeliest tokens `topk_logprobs_NK` is."""
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
