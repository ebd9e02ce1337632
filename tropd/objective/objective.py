"""An objective: terms, what they need, and their sum on one micro-batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.errors import ConfigError, EvidenceError, TrainingDiverged
from tropd.objective.chunks import Audit, audits
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32, joined
from tropd.objective.plan import Counts, Plan, make_plan
from tropd.objective.terms import Piece, Term
from tropd.types import READER, TermStats


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """The loss of one micro-batch and each term's part of it.  Both add over micro-batches and ranks."""

    loss: Tensor
    terms: dict[str, TermStats]


@dataclass(frozen=True)
class Objective:
    """L = sum of its terms.  `plan` once per batch, then call it on any cut of the rows.

    >>> objective = Objective(Term("pull", STUDENT, SampledReverseKL()))
    >>> tokens = some_tokens(student_logprobs_N=[-1.0, -2.0], teacher_logprobs_N=[-1.0, -4.0])
    >>> output = objective(tokens, StudentView(logprobs_N=tokens.student_logprobs_N), objective.plan(tokens))
    >>> output.loss  # (0 + 2) / 2 tokens
    tensor(1.)
    """

    terms: tuple[Term, ...]

    def __init__(self, *terms: Term) -> None:
        for wrong in [term for term in terms if not isinstance(term, Term)] or ([] if terms else [None]):
            raise ConfigError(f"an objective is made of {wrong!r}. Give it terms: Objective(Term(...), ...).")
        names = [term.name for term in terms]
        if len(set(names)) != len(names):
            raise ConfigError(f"two terms of one objective share a name: {', '.join(names)}.")
        object.__setattr__(self, "terms", terms)
        if alike := [a for a in self.memories if [b.memory for b in self.memories].count(a.memory) > 1]:
            raise ConfigError(
                f"{' and '.join(map(str, alike))} of one objective would share the memory {alike[0].memory!r}. Give "
                "them the same knobs, or keep one."
            )

    @property
    def needs(self) -> Needs:
        needs = Needs.NOTHING
        for term in self.terms:
            needs |= term.needs
        return needs

    @property
    def reach(self) -> Reach:
        return max(term.reach for term in self.terms)

    @property
    def memories(self) -> tuple[Piece, ...]:
        """The different pieces that remember something from step to step."""
        pieces = (piece for term in self.terms for part in (term.where, term.loss) for piece in part.remembering())
        return tuple(dict.fromkeys(pieces))

    def remember(self, tokens: Tokens, context: Context) -> None:
        """Once per step, after its plans: what its pieces keep of the whole batch of this rank."""
        kept = {f"{p.memory}/{name}": x for p in self.memories for name, x in p.remember(tokens, context).items()}
        context.memory.update(kept)

    @property
    def readers(self) -> tuple[str, ...]:
        """Everybody whose reading some term needs."""
        return tuple(sorted({name for term in self.terms for name in term.readers}))

    @property
    def asks(self) -> dict[str, Needs]:
        """What is read of each reader."""
        return joined(*(term.asks for term in self.terms))

    def needs_of(self, reader: str) -> Needs:
        return self.asks.get(reader, Needs.NOTHING)

    def columns_of(self, reader: str) -> tuple[str, ...]:
        """What is read of one reader by name."""
        named = set().union(*(piece.columns() for term in self.terms for piece in (term.where, term.loss)))
        return tuple(sorted(column for who, column in named if who == reader))

    @property
    def teacher_top_k(self) -> int:
        """How many of the teacher's likeliest tokens are read: by losses, rewards and selectors."""
        return self.top_k_of(READER)

    def top_k_of(self, reader: str) -> int:
        """How many of a reader's likeliest tokens are read."""
        return self._width("teacher", Needs.TOPK, reader)

    @property
    def student_top_k(self) -> int:
        return self._width("student", Needs.STUDENT_TOPK)

    def audit_of(self, reader: str) -> Audit | None:
        """Which chunks a reader is to write anew, if any."""
        asked = set().union(*(audits(piece, READER) for term in self.terms for piece in (term.where, term.loss)))
        own = {audit for who, audit in asked if who == reader}
        if len(own) > 1:
            raise ConfigError(f"reader {reader!r} is asked for chunks in {len(own)} ways at once. Ask for them in one.")
        return next(iter(own), None)

    def _width(self, whose: str, need: Needs, reader: str | None = None) -> int:
        pieces = [(term, piece) for term in self.terms for piece in (term.where, term.loss)]
        width = max(_support_width(piece, whose, reader) for _, piece in pieces)
        if need in (self.needs if reader is None else self.needs_of(reader)) and width < 1:
            names = ", ".join(repr(term.name) for term in self.terms if need in term.needs)
            raise ConfigError(
                f"term {names} reads the {whose}'s likeliest tokens (Needs.{need.name}), but no part of it says how "
                f"many. Give the piece that reads them `{whose}_top_k = 16`, as a class attribute or a property."
            )
        return width

    def with_ids(self, id_of: Callable[[str], int]) -> Objective:
        """The objective with the ids of tokens that it names by their text; each text is one token."""
        return Objective(*(term.with_ids(id_of) for term in self.terms))

    def check_ids(self, size: int) -> None:
        """Refuse ids of tokens that the models do not have."""
        ids = (i for term in self.terms for piece in (term.where, term.loss) for i in piece.named_ids())
        if (wrong := next((i for i in ids if i >= size), None)) is not None:
            raise ConfigError(
                f"the method names token id {wrong}, but the models share ids 0 to {size - 1}. Correct the id, or name "
                "the token by its text."
            )

    def plan(self, tokens: Tokens, context: Context | None = None, counts: Counts | None = None) -> Plan:
        return make_plan(self.terms, tokens, context or Context(), counts)

    def __call__(
        self, tokens: Tokens, student: StudentView, plan: Plan, terms: Sequence[Term] | None = None
    ) -> LossOutput:
        """The loss of these rows, of all terms or some.  A row that no term weighs is never computed, so it cannot
        spoil a gradient."""
        logprobs_N = at_least_float32(student.logprobs_N)
        if len(tokens) == 0:
            anchor = logprobs_N.sum()
        else:  # connected to the graph even when no term applies: every rank must run the same backward
            anchor = torch.nan_to_num(logprobs_N[:1].sum(), nan=0.0, posinf=0.0, neginf=0.0)
        loss, parts = 0.0 * anchor, {}
        student = student.with_(logprobs_N=logprobs_N)
        for term in self.terms if terms is None else terms:
            weight_N = plan.weights[term.name]
            rows = weight_N.nonzero().flatten()
            if len(rows) == 0:
                parts[term.name] = TermStats(loss=0.0, tokens=0.0, weight=0.0)
                continue
            loss = loss + self._part(term, tokens.rows(rows), student.rows(rows), plan.rows(rows), parts)
        return LossOutput(loss=loss, terms=parts)

    def _part(
        self, term: Term, tokens: Tokens, student: StudentView, plan: Plan, parts: dict[str, TermStats]
    ) -> Tensor:
        try:
            per_token_N = term.loss(tokens, student, plan.rewards.get(term.name))
        except EvidenceError as error:
            raise type(error)(f"term {term.name!r}: {error}") from error
        weight_N = plan.weights[term.name]
        total = (weight_N * per_token_N).sum()
        value = float(total.detach())
        if value != value or value in (float("inf"), float("-inf")):
            bad = int((~torch.isfinite(per_token_N)).sum())
            raise TrainingDiverged(
                f"term {term.name!r} is not finite on {bad} of {len(tokens)} tokens. Either a model gave a "
                "log-probability of -inf or NaN where this loss needs a finite one, or the weights have diverged."
            )
        parts[term.name] = TermStats(loss=value, tokens=float(len(tokens)), weight=float(weight_N.sum()))
        return total


def _support_width(piece: Piece, kind: str, reader: str | None = None, around: str = READER) -> int:
    """The largest top-k of one kind ("teacher" or "student") that a piece or its parts ask for, of one reader or of
    any."""
    own = piece.reader or around
    width = getattr(piece, f"{kind}_top_k", 0) if reader in (None, own) else 0
    return max([width, *(_support_width(part, kind, reader, own) for part in piece.parts())])
