"""The algebra: an objective is a sum of terms, a term is *which tokens* times *what to minimise there*.

    L = sum_k  c_k(u) * (1 / N_k) * sum_n  w_k[n] * l_k[n]            u = training progress in [0, 1]

    Selector   tokens -> weights >= 0, no gradient     which tokens, how much; closed under & | ~
    Measure    tokens -> numbers, no gradient          what a selector looks at
    Reward     (reward, tokens) -> reward, no gradient how good a written token was; chainable
    TokenLoss  (tokens, student) -> loss per token     the only piece with a gradient

Selectors, measures and rewards are evaluated once per batch, in `plan`; the rest is computed row by row, so
any cut into micro-batches, ranks or tiles gives the same gradient.  Each piece declares what evidence it reads
(`needs`) and how far it looks (`reach`); both are collected from its parts.

Evidence comes from readers.  A piece with `reader="peer"` sees the evidence of that one where it reads the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import reduce, wraps
from operator import or_
from typing import Any, ClassVar, Literal, Self

from torch import Tensor

from tropd.base.ranges import Finite, Ranged
from tropd.errors import ConfigError
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import OF_TEACHER, Evidence, Needs, StudentView, Tokens, joined
from tropd.objective.schedules import Schedule
from tropd.types import READER


def _as_of_reader(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The call with evidence as of the piece's own reader, so that no piece can read another's by mistake."""

    @wraps(call)
    def seen(self: Piece, *given: Any) -> Tensor:
        if self.reader is None:
            return call(self, *given)
        return call(self, *(x.of(self.reader) if isinstance(x, Evidence) else x for x in given))

    return seen


@dataclass(frozen=True)
class Piece(Ranged):
    """A part of an objective.  Subclasses are frozen dataclasses; parts of parts are found in their fields."""

    reader: str | None = field(default=None, kw_only=True)
    """Whose evidence it sees as the teacher's; None: that of the piece around it, in the end the teacher's."""

    own_needs: ClassVar[Needs] = Needs.NOTHING
    own_columns: ClassVar[tuple[str, ...]] = ()
    """Columns of its reader that it reads (`Tokens.column`)."""
    own_reach: ClassVar[Reach] = Reach.TOKEN
    memory: ClassVar[str] = ""
    """What its tensors in `context.memory` are called: MEMORY/NAME; empty where it remembers nothing."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__call__" in vars(cls):
            cls.__call__ = _as_of_reader(cls.__call__)  # type: ignore[attr-defined]

    def parts(self) -> Iterator[Piece]:
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, Piece):
                    yield part

    def remember(self, tokens: Tokens, context: Context) -> Mapping[str, Tensor]:
        """What it keeps for the next steps, by name: small tensors, the same on all ranks.  Called once per step, after
        the step's plans, with the whole batch of this rank."""
        return {}

    def remembering(self) -> Iterator[Piece]:
        """The pieces that remember: this one and its parts."""
        if self.memory:
            yield self
        for part in self.parts():
            yield from part.remembering()

    def own_asks(self, reader: str) -> Mapping[str, Needs]:
        """What it reads itself, by reader; `reader` is its own.  Override it where it looks at several."""
        return {reader: self.own_needs}

    def asks(self, around: str = READER) -> dict[str, Needs]:
        """What it and its parts read, by reader; `around` is the reader of the piece around it."""
        reader = self.reader or around
        return joined(self.own_asks(reader), *(part.asks(reader) for part in self.parts()))

    def columns(self, around: str = READER) -> set[tuple[str, str]]:
        """(reader, column) of everything that is read by name."""
        reader = self.reader or around
        own = {(reader, name) for name in self.own_columns}
        return own.union(*(part.columns(reader) for part in self.parts()))

    def with_ids(self, id_of: Callable[[str], int]) -> Self:
        """The piece with the ids of tokens that its parts name by their text."""
        changed = copy(self)
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Piece):
                object.__setattr__(changed, f.name, value.with_ids(id_of))
            elif isinstance(value, tuple) and any(isinstance(part, Piece) for part in value):
                parts = tuple(part.with_ids(id_of) if isinstance(part, Piece) else part for part in value)
                object.__setattr__(changed, f.name, parts)
        return changed

    def named_ids(self) -> Iterator[int]:
        """The ids of tokens that it and its parts name."""
        for part in self.parts():
            yield from part.named_ids()

    @property
    def needs(self) -> Needs:
        """What it reads of anybody."""
        return reduce(or_, self.asks().values(), Needs.NOTHING)

    @property
    def reach(self) -> Reach:
        own = Reach.BATCH if self.memory else self.own_reach  # what remembers looks at whole batches
        return max([own, *(part.reach for part in self.parts())])

    def __str__(self) -> str:
        """Name and arguments that differ from the defaults: what `tropd explain` prints."""
        arguments = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if value == f.default:
                continue
            if isinstance(value, tuple):
                arguments.append(", ".join(map(str, value)))
            else:
                arguments.append(str(value) if isinstance(value, Piece) else f"{f.name}={value}")
        return f"{type(self).__name__}({', '.join(arguments)})" if arguments else type(self).__name__


class Measure(Piece):
    """A number per token, no gradient."""

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        raise NotImplementedError


class Selector(Measure):
    """A weight >= 0 per token: which tokens, how much."""

    def __and__(self, other: Selector) -> Selector:
        return Both(self, other)

    def __or__(self, other: Selector) -> Selector:
        return Either(self, other)

    def __invert__(self) -> Selector:
        return self.inner if isinstance(self, Not) else Not(self)


@dataclass(frozen=True)
class Both(Selector):
    """`a & b`: the product of two weights.

    >>> tokens = some_tokens(authors_N=[1, 1, 2], teacher_entropy_N=[0.1, 1.5, 1.5])  # the teacher wrote the last
    >>> (STUDENT & TeacherEntropyAbove(0.8))(tokens, Context())
    tensor([0., 1., 0.])
    """

    first: Selector
    second: Selector

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return self.first(tokens, context) * self.second(tokens, context)

    def __str__(self) -> str:
        return f"{self.first} & {self.second}"


@dataclass(frozen=True)
class Either(Selector):
    """`a | b`: 1 - (1 - a)(1 - b).

    >>> tokens = some_tokens(authors_N=[1, 2, 2], teacher_entropy_N=[0.1, 0.1, 1.5])  # the student wrote the first
    >>> (STUDENT | TeacherEntropyAbove(0.8))(tokens, Context())
    tensor([1., 0., 1.])
    """

    first: Selector
    second: Selector

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        a_N, b_N = self.first(tokens, context), self.second(tokens, context)
        return a_N + b_N - a_N * b_N

    def __str__(self) -> str:
        return f"({self.first} | {self.second})"


@dataclass(frozen=True)
class Not(Selector):
    """`~a`: 1 - a.  Of a soft selector it is the rest of the weight.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-0.1, -3.0])
    >>> (~TrustRegion("soft"))(tokens, Context())
    tensor([0.0000, 0.9179])
    """

    inner: Selector

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return 1.0 - self.inner(tokens, context)

    def __str__(self) -> str:
        return f"~({self.inner})" if isinstance(self.inner, Both) else f"~{self.inner}"


class Reward(Piece):
    """How good a written token was: takes the reward so far, in nats, and gives the next one.  No gradient."""

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        raise NotImplementedError


class TokenLoss(Piece):
    """What to minimise at a token.  `reward` is computed in the plan and comes back as `reward_N`."""

    reward: Reward | None = None

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        raise NotImplementedError


def check_piece(piece: Any, kind: type[Piece], what: str) -> None:
    """Refuse where it is made what could only fail where it is used."""
    if not isinstance(piece, kind):
        said = f"the class {piece.__name__}" if isinstance(piece, type) else f"a {type(piece).__name__}"
        raise ConfigError(f"{what} is {said}. Give an object of a {kind.__name__}.")


Over = Literal["actions", "student", "teacher", "members", "sequences"]
"""What a term's sum is divided by: all trained tokens of the batch; those the student wrote; those the teacher wrote;
the selector's own weights; or per sequence and then over sequences (a mean of means, where a paper says so)."""


@dataclass(frozen=True)
class Term(Ranged):
    """A loss on some tokens: which tokens, what to minimise there, with which weight, divided by what.

    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -2.0, -3.0], authors_N=[1, 1, 2])
    >>> term = Term("imitate", STUDENT, NegativeLogLikelihood(), weight=0.5, over="student")
    >>> Objective(term).plan(tokens).weights["imitate"]  # 0.5 / 2 on each of the student's tokens
    tensor([0.2500, 0.2500, 0.0000])
    """

    name: str
    where: Selector
    loss: TokenLoss
    weight: Finite | Schedule = 1.0
    over: Over = "actions"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.where, Selector, f"term {self.name!r}: where")
        check_piece(self.loss, TokenLoss, f"term {self.name!r}: loss")

    @property
    def needs(self) -> Needs:
        return self.where.needs | self.loss.needs

    @property
    def asks(self) -> dict[str, Needs]:
        """What is read of each reader."""
        return joined(self.where.asks(), self.loss.asks())

    @property
    def readers(self) -> tuple[str, ...]:
        """Those whose reading it needs."""
        columns = {reader for piece in (self.where, self.loss) for reader, _ in piece.columns()}
        return tuple(sorted(columns | {name for name, needs in self.asks.items() if needs & OF_TEACHER}))

    @property
    def reach(self) -> Reach:
        wide = Reach.BATCH if self.over == "members" else Reach.TOKEN
        return max(self.where.reach, self.loss.reach, wide)

    def with_ids(self, id_of: Callable[[str], int]) -> Term:
        """The term with the ids of tokens that it names by their text."""
        return replace(self, where=self.where.with_ids(id_of), loss=self.loss.with_ids(id_of))

    def coefficient(self, progress: float) -> float:
        return self.weight(progress) if isinstance(self.weight, Schedule) else self.weight
