"""The objective on the rows of one micro-batch, all at once or piece by piece, and what probes need of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.objective.context import Context
from tropd.objective.evidence import ABSENT, StudentView, Tokens
from tropd.objective.hidden import reads_states
from tropd.objective.objective import Objective
from tropd.objective.plan import Counts, Plan, live_rows
from tropd.training.batches import ScoredBatch
from tropd.types import TermStats


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """What is kept of some rows after their loss is computed, without gradient."""

    loss: float
    terms: dict[str, TermStats]
    planned_N: Tensor | None
    """The student's log-probabilities that the plan was made from."""
    view: StudentView
    plan: Plan


@dataclass(frozen=True, kw_only=True, eq=False)
class MicroBatch:
    """Rollouts of one forward and backward pass.  Tokens and plan hold the live rows only: those that some term may
    weigh."""

    part: ScoredBatch
    objective: Objective
    context: Context
    counts: Counts
    tokens: Tokens
    plan: Plan | None
    """The plan, if it was made from the whole batch; else each piece is planned from its own student view."""
    live: Tensor | None
    """Row numbers of the live rows in `part`; None for all."""

    @classmethod
    def of(
        cls, part: ScoredBatch, objective: Objective, context: Context, counts: Counts, plan: Plan | None
    ) -> MicroBatch:
        live_N = live_rows(objective.terms, part.tokens, context, plan)
        live = None if bool(live_N.all()) else live_N.nonzero().flatten()
        if live is not None:
            TAKEN.add(FastPath.LIVE_ROWS)
        return cls(
            part=part,
            objective=objective,
            context=context,
            counts=counts,
            tokens=part.tokens if live is None else part.tokens.rows(live),
            plan=plan if plan is None or live is None else plan.rows(live),
            live=live,
        )

    def side(self, position: int, *, before: bool) -> MicroBatch:
        """The same with weight on one side of a position in the responses alone; it has to be planned."""
        assert self.plan is not None
        there_N = (self.tokens.positions_N < position) == before
        weights = {name: weight_N * there_N for name, weight_N in self.plan.weights.items()}
        return replace(self, plan=replace(self.plan, weights=weights))

    def loss(self, rows: slice, view: StudentView, whole: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Piece]:
        """The loss of some live rows, and what is kept of them.  `whole` are whole distributions, which exist for these
        rows only, by reader."""
        tokens = self.tokens.rows(rows)
        for name, full_CV in (whole or {}).items():
            tokens = tokens.told(name, teacher_full_logprobs_NV=full_CV)
        if self.plan is not None:
            plan = self.plan.rows(rows)
        else:
            if not self.part.measured:
                tokens = tokens.with_(student_logprobs_N=view.logprobs_N.detach())
            plan = self.objective.plan(tokens, self.context, self.counts)
        apart = view.peek("hidden_NH") is None  # what reads hidden states is left to `add_states`
        terms = [term for term in self.objective.terms if not (apart and reads_states(term))]
        output = self.objective(tokens, view, plan, terms)
        top_k = view.peek("topk_logprobs_NK")
        kept = StudentView(
            logprobs_N=view.logprobs_N.detach(), topk_logprobs_NK=ABSENT if top_k is None else top_k.detach()
        )
        planned_N = tokens.peek("student_logprobs_N")
        loss = float(output.loss.detach())
        return output.loss, Piece(loss=loss, terms=output.terms, planned_N=planned_N, view=kept, plan=plan)

    def loss_of_all(self, view: StudentView) -> tuple[Tensor, Piece]:
        """The loss, from a view of every response token of the rollouts, live or not."""
        return self.loss(slice(None), view if self.live is None else view.rows(self.live))

    def add_states(self, seen: Seen, hidden_NH: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, Seen]:
        """The loss of the terms that read the student's hidden states, over all live rows at once, and what was seen
        with it.  The planned weights are those of the pieces."""
        terms = [term for term in self.objective.terms if reads_states(term)]
        view = seen.view.with_(hidden_NH=hidden_NH, columns=columns)
        output = self.objective(seen.tokens, view, seen.plan, terms)
        loss = output.loss + 0.0 * hidden_NH[:1].sum()  # connected to the graph, whatever is weighed
        return loss, replace(
            seen, loss=seen.loss + float(output.loss.detach()), terms=add_terms(seen.terms, output.terms)
        )

    def seen(self, pieces: Sequence[Piece], own_topk_ids_NK: Tensor | None = None) -> Seen:
        """Join the pieces, in order, to the whole micro-batch."""
        terms: dict[str, TermStats] = {}
        for piece in pieces:
            terms = add_terms(terms, piece.terms)
        planned = [piece.planned_N for piece in pieces if piece.planned_N is not None]
        top_k = [x for piece in pieces if (x := piece.view.peek("topk_logprobs_NK")) is not None]
        plans = [piece.plan for piece in pieces]
        whole = len(pieces)
        return Seen(
            part=self.part,
            loss=sum(piece.loss for piece in pieces),
            terms=terms,
            tokens=self.tokens.with_(student_logprobs_N=torch.cat(planned)) if len(planned) == whole else self.tokens,
            view=StudentView(
                logprobs_N=torch.cat([piece.view.logprobs_N for piece in pieces]),
                topk_logprobs_NK=torch.cat(top_k) if len(top_k) == whole else ABSENT,
            ),
            plan=Plan(
                weights={name: torch.cat([plan.weights[name] for plan in plans]) for name in plans[0].weights},
                rewards={name: torch.cat([plan.rewards[name] for plan in plans]) for name in plans[0].rewards},
                counts=self.counts,
                progress=self.context.progress,
            ),
            live=self.live,
            own_topk_ids_NK=own_topk_ids_NK,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """A micro-batch after its loss.  Tokens, view and plan hold the live rows only."""

    part: ScoredBatch
    loss: float
    terms: dict[str, TermStats]
    tokens: Tokens
    view: StudentView
    plan: Plan
    live: Tensor | None
    own_topk_ids_NK: Tensor | None = None
    """The student's likeliest tokens, where they were read off the pass; -1 in rows that were not looked at."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """By term, then by rollout: the weight of each response token."""
        return {term: self._by_rollout(weight_N, 0.0) for term, weight_N in self.plan.weights.items()}

    def student_logprobs(self) -> dict[str, Tensor]:
        """By rollout, as of planning where that is known; NaN where there was no loss."""
        planned_N = self.tokens.peek("student_logprobs_N")
        return self._by_rollout(self.view.logprobs_N if planned_N is None else planned_N, torch.nan)

    def _by_rollout(self, x_N: Tensor, elsewhere: float) -> dict[str, Tensor]:
        if self.live is not None:
            x_N = x_N.new_full((len(self.part.tokens),), elsewhere).index_copy(0, self.live, x_N)
        rows = x_N.split([len(r.response_ids) for r in self.part.rollouts])
        return {r.id: row for r, row in zip(self.part.rollouts, rows, strict=True)}


def add_terms(a: dict[str, TermStats], b: dict[str, TermStats], share: float = 1.0) -> dict[str, TermStats]:
    """a + share * b, term by term; tokens are counted, not shared."""
    total = dict(a)
    for name, part in b.items():
        old = a.get(name, TermStats(loss=0.0, tokens=0.0, weight=0.0))
        total[name] = TermStats(
            loss=old.loss + share * part.loss,
            tokens=old.tokens + part.tokens,
            weight=old.weight + share * part.weight,
        )
    return total
