"""What is recorded of a step while the student is trained: probes, and numbers per token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tropd.distributed.ranks import Ranks
from tropd.monitoring.probe import Probe, Sight
from tropd.monitoring.probes import Sums, probe_batch
from tropd.monitoring.probing import Probing
from tropd.monitoring.teachers import probes_of
from tropd.objective.heard import as_heard
from tropd.objective.support import NOTHING
from tropd.training.batches import ScoredBatch
from tropd.training.micro_batch import Seen
from tropd.types import Author, Sampling

_UNKNOWN = {"teacher_logprobs_N": torch.nan, "teacher_topk_logprobs_NK": NOTHING}
"""What `write_rollouts` takes for evidence that is not there."""


class Watched:
    """Gets each micro-batch of a step; then gives the probes of the whole step and the numbers of each token."""

    def __init__(
        self,
        batch: ScoredBatch,
        sampling: Sampling | None,
        *,
        step: int = 0,
        probes: Sequence[Probe] = (),
        teachers: tuple[str, ...] = (),
        stale: bool = False,
    ) -> None:
        """`probes` are asked beside tropd's own; `teachers` are those of several that the batch has rollouts for;
        `stale`: an older student wrote it."""
        self.step, self.others = step, Probing(probes, step)
        self.batch, self.sums, self.stale, self.sampling = batch, Sums.nothing(), stale, sampling
        top_NK = batch.tokens.peek("teacher_topk_logprobs_NK")
        self.sampled = top_NK is not None and bool((top_NK[:, :1] <= NOTHING).any())
        self.sums_of = {name: Sums.nothing() for name in teachers}
        self.weights: dict[str, dict[str, Tensor]] = {}
        self.student: dict[str, Tensor] = {}

    def __call__(self, seen: Seen) -> None:
        rollouts = seen.part.rollouts
        settings: dict[str, Any] = {"sampled": self.sampled, "sampling": self.sampling, "stale": self.stale}
        student = {"topk_logprobs_NK": seen.view.peek("topk_logprobs_NK"), "own_topk_ids_NJ": seen.own_topk_ids_NK}
        self.sums += probe_batch(seen.tokens, rollouts, **student, **settings)
        for name in self.sums_of:
            rows_N = _rows_for(name, seen)
            known = {what: None if x is None else x[rows_N] for what, x in student.items()}
            theirs = [rollout for rollout in rollouts if rollout.prompt.teacher == name]
            self.sums_of[name] += probe_batch(seen.tokens.rows(rows_N), theirs, **known, **settings)
        sight = Sight(step=self.step, rollouts=rollouts, tokens=seen.tokens, view=seen.view, plan=seen.plan)
        self.others.look(sight)
        for term, by_rollout in seen.weights().items():
            self.weights.setdefault(term, {}).update(by_rollout)
        self.student.update(seen.student_logprobs())

    def probes(self, world: Ranks) -> dict[str, float]:
        """The probes of all ranks; every rank must call this."""
        each = [probes_of(name, sums.gather(world).result()) for name, sums in self.sums_of.items()]
        whole, own = self.sums.gather(world).result(), self.others.result(world)
        return {name: value for part in (own, whole, *each) for name, value in part.items()}

    def evidence(self) -> dict[str, Any]:
        """The numbers of each token of the batch, as arguments of `write_rollouts`."""
        tokens, rollouts = self.batch.tokens, self.batch.rollouts
        student_N = torch.cat([self.student[r.id] for r in rollouts])
        sampled_N = tokens.peek("student_logprobs_N")
        if sampled_N is not None:  # rows that no term could weigh were not in the gradient pass
            unseen_N = student_N.isnan() & (tokens.authors_N == Author.STUDENT)
            student_N = torch.where(unseen_N, sampled_N.to(student_N), student_N)
        weights = {term: torch.cat([by[r.id] for r in rollouts]) for term, by in self.weights.items()}
        teacher = {name: tokens.peek(name) for name in ("teacher_topk_ids_NK", *_UNKNOWN)}
        unread_N = as_heard(tokens, [tokens.reader]).authors_N != tokens.authors_N
        if bool(unread_N.any()):  # what is filled in there is nobody's opinion
            for name, unknown in _UNKNOWN.items():
                if (x := teacher[name]) is not None:
                    teacher[name] = x.masked_fill(unread_N if x.dim() == 1 else unread_N[:, None], unknown)
        return {"student_logprobs_N": student_N, "weights": weights, **teacher}


def _rows_for(teacher: str, seen: Seen) -> Tensor:
    """The live rows of what one of several teachers scored."""
    rollouts = seen.part.rollouts
    theirs_S = torch.tensor([rollout.prompt.teacher == teacher for rollout in rollouts])
    theirs_N = theirs_S.repeat_interleave(torch.tensor([len(rollout.response_ids) for rollout in rollouts]))
    theirs_N = theirs_N.to(seen.tokens.token_ids_N.device)
    return theirs_N if seen.live is None else theirs_N[seen.live]
