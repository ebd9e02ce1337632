"""One training step: score -> plan -> forward and backward -> optimise.

                 rollouts
                    |                       student evidence (only what the objective reads)
    teacher.score --+--> ScoredBatch --> plan: weights, rewards, global denominators
                                            |
                    micro-batch --> student forward --> loss --> backward            (sums, never means of means)
                                            |
                                     optimiser step

If every term looks at one token only and a rollout batch gets one step, the plan of a micro-batch comes from the
student's training pass, exact and at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tropd.errors import TopKLeftOut
from tropd.model.forward import similar_lengths
from tropd.objective.context import Context, Reach
from tropd.objective.objective import Objective
from tropd.objective.plan import Counts, Plan, count
from tropd.teachers.teacher import Teacher
from tropd.training.alignment import Alignment
from tropd.training.batches import ScoredBatch
from tropd.training.micro_batch import MicroBatch, Seen, add_terms
from tropd.training.protocols import Learner
from tropd.training.scoring import by_name, with_every_top_k
from tropd.types import TermStats


@dataclass
class StepSums:
    """Sums over the micro-batches of a step."""

    loss: float = 0.0
    terms: dict[str, TermStats] = field(default_factory=dict)
    gradient_norms: list[float] = field(default_factory=list)
    learning_rate: float = 0.0

    def add(self, loss: float, terms: dict[str, TermStats], share: float) -> None:
        self.loss += share * loss
        self.terms = add_terms(self.terms, terms, share)


Watch = Callable[[Seen], None]
"""Called once per micro-batch, for probes and for rollouts that are kept."""


def train_step(
    batch: ScoredBatch,
    objective: Objective,
    learner: Learner,
    context: Context,
    *,
    tokens_per_micro_batch: int,
    num_updates: int = 1,
    watch: Watch | None = None,
    places: Sequence[int] | None = None,
    teacher: Teacher | Mapping[str, Teacher] | None = None,
    split: Alignment | None = None,
) -> StepSums:
    """Gradient and optimiser step(s) on a scored batch.

    `teacher`, or every reader by its name, scores a micro-batch again where a term reads a top-k that was left out.

    With several updates each is planned on its own share of the rollouts; importance ratios correct for the drift.
    `split` compares the gradients of two parts of the responses in the first update; their sum is the gradient.
    `places` are the rollouts' indices in the batch of all ranks, so that shares do not depend on the number of ranks.
    """
    sums = StepSums()
    places = range(len(batch.rollouts)) if places is None else places
    for u in range(num_updates):
        chosen = [i for i, place in enumerate(places) if place % num_updates == u]
        part = batch if num_updates == 1 else batch.only(chosen)
        how = (tokens_per_micro_batch, sums, 1.0 / num_updates, watch, teacher, split if u == 0 else None)
        _accumulate(part, objective, learner, context, *how)
        norm, sums.learning_rate = learner.update()
        sums.gradient_norms.append(norm)
    return sums


def recall_needed(objective: Objective, num_updates: int, split: Alignment | None = None) -> bool:
    """Whether plans need a separate pass of the student."""
    return objective.reach > Reach.TOKEN or num_updates > 1 or split is not None


def _accumulate(
    batch: ScoredBatch,
    objective: Objective,
    learner: Learner,
    context: Context,
    max_tokens: int,
    sums: StepSums,
    share: float,
    watch: Watch | None,
    teacher: Teacher | Mapping[str, Teacher] | None,
    split: Alignment | None,
) -> None:
    whole: Plan | None = None
    if objective.reach > Reach.TOKEN or split is not None:
        whole = objective.plan(batch.tokens, context)
    counts: Counts = whole.counts if whole else count(batch.tokens, context, objective.terms)
    groups = similar_lengths([len(r.token_ids) for r in batch.rollouts], max_tokens)
    spare = learner.spare_passes(len(groups), context.world) if context.world.size > 1 else 0

    def learn(part: ScoredBatch, plan: Plan | None, before: bool | None) -> Seen:
        micro = MicroBatch.of(part, objective, context, counts, plan)
        if split is None or before is None:
            return learner.learn(micro)
        return replace(learner.learn(micro.side(split.position, before=before)), plan=micro.plan)

    for before in (None,) if split is None else (True, False):
        for chosen in groups:
            part = batch.take(chosen)
            plan = whole.rows(batch.rows_of(chosen)) if whole else None
            try:
                seen = learn(part, plan, before)
            except TopKLeftOut:  # raised by the loss, before any gradient
                if teacher is None:
                    raise
                part = with_every_top_k(part, objective, by_name(teacher))
                seen = learn(part, plan, before)
            sums.add(seen.loss, seen.terms, share)
            if watch is not None and not before:
                watch(seen)
        if context.world.size > 1:
            learner.idle(spare)
        if split is not None and before:
            split.between()
