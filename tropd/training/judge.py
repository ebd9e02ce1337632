"""The objective on the rows of one micro-batch, asked all at once or piece by piece."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.objective.evidence import ABSENT, StudentView, Tokens
from tropd.objective.objective import Objective
from tropd.objective.plan import Counts, Plan, live_rows
from tropd.objective.terms import Context
from tropd.training.batches import ScoredBatch
from tropd.types import TermStats


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What was judged.  Tokens, view and plan hold the live rows only: those that some term may weigh."""

    part: ScoredBatch
    tokens: Tokens
    view: StudentView
    plan: Plan
    live: Tensor | None
    """Their row numbers in `part`; None for all."""

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """By term, then by rollout: the weight of each response token."""
        return {term: self._by_rollout(weight_N, 0.0) for term, weight_N in self.plan.weights.items()}

    def student_logprobs(self) -> dict[str, Tensor]:
        """By rollout, as of planning where that is known; NaN where nothing was judged."""
        planned_N = self.tokens.peek("student_logprobs_N")
        return self._by_rollout(self.view.logprobs_N if planned_N is None else planned_N, torch.nan)

    def _by_rollout(self, x_N: Tensor, elsewhere: float) -> dict[str, Tensor]:
        if self.live is not None:
            x_N = x_N.new_full((len(self.part.tokens),), elsewhere).index_copy(0, self.live, x_N)
        rows = x_N.split([len(r.response_ids) for r in self.part.rollouts])
        return {r.id: row for r, row in zip(self.part.rollouts, rows, strict=True)}


class Judge:
    """Without a plan of the whole batch each piece is planned from the student's opinion that comes with it."""

    def __init__(
        self, part: ScoredBatch, objective: Objective, context: Context, counts: Counts, plan: Plan | None
    ) -> None:
        self.part, self.objective, self.context, self.counts = part, objective, context, counts
        live_N = live_rows(objective.terms, part.tokens, context, plan)
        self.live = None if bool(live_N.all()) else live_N.nonzero().flatten()
        if self.live is not None:
            TAKEN.add(FastPath.LIVE_ROWS)
        self.tokens = part.tokens if self.live is None else part.tokens.rows(self.live)
        self.plan = plan if plan is None or self.live is None else plan.rows(self.live)
        self.loss: float = 0.0
        self.terms: dict[str, TermStats] = {}
        self._seen: list[tuple[Tensor | None, StudentView, Plan]] = []

    def live_view(self, whole: StudentView) -> StudentView:
        """The live rows of a view of every response token."""
        return whole if self.live is None else whole.rows(self.live)

    def __call__(self, rows: slice, view: StudentView, **evidence: Tensor) -> Tensor:
        """The loss of some live rows.  `evidence` is what exists for these only, such as whole distributions."""
        tokens = self.tokens.rows(rows).with_(**evidence)
        if self.plan is not None:
            plan = self.plan.rows(rows)
        else:
            if not self.part.measured:
                tokens = tokens.with_(student_logprobs_N=view.logprobs_N.detach())
            plan = self.objective.plan(tokens, self.context, self.counts)
        output = self.objective(tokens, view, plan)
        self.loss += float(output.loss.detach())
        self.terms = add_terms(self.terms, output.terms)
        seen = StudentView(logprobs_N=view.logprobs_N.detach(), topk_logprobs_NK=_kept(view.peek("topk_logprobs_NK")))
        self._seen.append((tokens.peek("student_logprobs_N"), seen, plan))
        return output.loss

    def seen(self) -> Seen:
        """What was judged, whole again."""
        own, views, plans = zip(*self._seen, strict=True)
        tokens = self.tokens
        if all(x is not None for x in own):
            tokens = tokens.with_(student_logprobs_N=torch.cat(own))
        at_teacher = [v.peek("topk_logprobs_NK") for v in views]
        view = StudentView(
            logprobs_N=torch.cat([v.logprobs_N for v in views]),
            topk_logprobs_NK=torch.cat(at_teacher) if all(x is not None for x in at_teacher) else ABSENT,
        )
        plan = Plan(
            weights={name: torch.cat([p.weights[name] for p in plans]) for name in plans[0].weights},
            rewards={name: torch.cat([p.rewards[name] for p in plans]) for name in plans[0].rewards},
            counts=self.counts,
            progress=self.context.progress,
        )
        return Seen(part=self.part, tokens=tokens, view=view, plan=plan, live=self.live)


def _kept(x: Tensor | None) -> Tensor:
    return ABSENT if x is None else x.detach()


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
