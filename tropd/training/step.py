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

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from tropd.errors import EvidenceError, TopKLeftOut
from tropd.model.forward import similar_lengths
from tropd.monitoring.sample import sampled_rows
from tropd.objective.evidence import OF_TEACHER, Needs, Tokens
from tropd.objective.objective import Objective
from tropd.objective.plan import Counts, Plan, count
from tropd.objective.terms import Context, Reach, World
from tropd.teachers.teacher import ScoreRequest, Teacher, TopKRows
from tropd.training.batches import ScoredBatch, add_scores, make_tokens
from tropd.training.micro_batch import MicroBatch, Seen, add_terms
from tropd.types import Author, Rollout, TeacherScores, TermStats


class Learner(Protocol):
    """The student, as the training step uses it."""

    device: torch.device
    vocab_size: int | None
    expands: bool
    """Whether it makes the teacher's whole distributions from the teacher's hidden states."""
    margin: float | None
    """The log-odds of a written token seldom differ by more than this from those in its rollout; None if a micro-batch
    cannot be scored again when they do."""

    def learn(self, batch: MicroBatch) -> Seen:
        """Add the gradient of the micro-batch's loss, taken in as many pieces as the learner likes."""
        ...

    def measure(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int) -> dict[str, Tensor]:
        """Its log-probabilities and the like, without gradient, as fields of Tokens for the plan."""
        ...

    def reverse_kl(self, rollouts: Sequence[Rollout], teacher: Teacher, as_read: Sequence[Rollout]) -> Tensor:
        """KL(student || teacher) at every response token; `as_read` are the rollouts as the teacher reads them."""
        ...

    def spare_passes(self, num_passes: int, world: World) -> int:
        """How many more passes the busiest rank has.  Every rank calls this before its first pass: ranks run them
        together."""
        ...

    def idle(self, num_passes: int) -> None:
        """Take part in the remaining passes of other ranks; every rank calls this after its last pass."""
        ...

    def update(self) -> tuple[float, float]:
        """One optimiser step with the current gradients: (gradient norm before clipping, learning rate)."""
        ...


PASS_NEEDS = Needs.STUDENT_ENTROPY | Needs.STUDENT_TOPK | Needs.REVERSE_KL
"""The student's evidence that must exist before the gradient pass."""


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


def check_evidence(objective: Objective, teacher: Teacher, name: str, grader: bool) -> None:
    """Refuse before step 0 a method that would fail later for lack of evidence."""
    lacking = objective.needs & OF_TEACHER & ~teacher.capabilities
    if lacking:
        terms = [t.name for t in objective.terms if t.needs & lacking]
        raise EvidenceError(
            f"term {', '.join(map(repr, terms))} of method {name!r} needs {_names(lacking)} from "
            f"{_offers(teacher, lacking)}. Use another method (`tropd methods`), or a teacher in this process, which "
            "can answer everything."
        )
    if Needs.REWARD in objective.needs and not grader:
        raise EvidenceError(f"method {name!r} reads a grader's reward: set `grader`.")


def _offers(teacher: Teacher, lacking: Needs) -> str:
    """What the teacher offers, or those of several teachers that offer too little."""
    each = {name: single.capabilities for name, single in teacher.teachers.items()}
    short = [f"{name!r} offers {_names(offered)}" for name, offered in each.items() if lacking & ~offered]
    if len(each) < 2 or not short:
        return f"the teacher, which offers {_names(teacher.capabilities)}"
    return "every teacher, but " + " and ".join(short)


def _names(needs: Needs) -> str:
    return " and ".join(str(n.name) for n in needs) or "nothing"


def score(
    rollouts: Sequence[Rollout],
    objective: Objective,
    teacher: Teacher,
    learner: Learner,
    *,
    seed: int,
    recall: bool,
    context: Context | None = None,
    scores: Sequence[TeacherScores] | None = None,
    as_read: Sequence[Rollout] = (),
) -> ScoredBatch:
    """Join everything known about the rollouts.  `recall`: plan from the student as it is now, not as it will be.
    `scores` are the teacher's, where it has been asked already.  `as_read` are the rollouts as the teacher reads them,
    with another prompt before the same responses; by default as prompts say (`Rollout.as_told`)."""
    as_read = tuple(as_read or (rollout.as_told for rollout in rollouts))
    context = context or Context()
    tokens = make_tokens(rollouts, seed, learner.device, learner.vocab_size)
    if context.world.size > 1:  # groups are numbered on each rank, and no group is on two
        tokens = tokens.with_(groups_S=tokens.groups_S * context.world.size + context.world.rank)
    needs = objective.needs
    student: dict[str, Tensor] = {}
    if recall or needs & PASS_NEEDS:
        student = learner.measure(rollouts, needs, objective.student_top_k)
    ids_NJ = student.get("student_topk_ids_NJ")
    ids_TJ = None if ids_NJ is None else ids_NJ.split([len(r.response_ids) for r in rollouts])
    if Needs.FULL in needs and Needs.HIDDEN in teacher.capabilities and learner.expands:
        needs = (needs & ~Needs.FULL) | Needs.HIDDEN  # whole distributions are made tile by tile, where they are read
    if needs & OF_TEACHER:
        if scores is None:
            known = tokens.with_(**student)
            wanted = top_k_rows(objective, known, context, 0.0 if student else learner.margin)
            request = ScoreRequest(
                as_read, needs, top_k=objective.teacher_top_k, student_topk_ids_TJ=ids_TJ, top_k_rows=wanted
            )
            scores = teacher.score(request)
        tokens = add_scores(tokens, rollouts, scores, needs)
    if Needs.REVERSE_KL in needs:
        student["reverse_kl_N"] = learner.reverse_kl(rollouts, teacher, as_read)
    return ScoredBatch(
        rollouts=tuple(rollouts), tokens=tokens.with_(**student), measured=bool(student), as_read=as_read
    )


def top_k_rows(objective: Objective, tokens: Tokens, context: Context, margin: float | None) -> TopKRows | None:
    """Which rows' top-k a term may read, decided while the teacher's tile is in memory; None if that cannot be known.

    The student's log-probabilities are those of the rollouts, so a row counts if it would count anywhere within the
    margin.  The margin is in log-odds: a sure token stays sure, whatever the rounding of its logits.  A random eighth
    of the rows is added, so that probes of the support cover all tokens.
    """
    terms = [term for term in objective.terms if Needs.TOPK in term.needs]
    simple = all(t.where.needs in (Needs.NOTHING, Needs.SAMPLED) and t.where.reach == Reach.TOKEN for t in terms)
    simple &= not any(t.loss.reward is not None and Needs.TOPK in t.loss.reward.needs for t in terms)
    if not terms or not simple or margin is None or tokens.peek("student_logprobs_N") is None:
        return None

    def decide(rows_C: Tensor, teacher_logprobs_C: Tensor) -> Tensor:
        part = tokens.rows(rows_C.to(tokens.token_ids_N.device)).with_(teacher_logprobs_N=teacher_logprobs_C)
        chosen_C = sampled_rows(part) & (part.authors_N == Author.STUDENT)
        for nudge in {-margin, 0.0, margin}:
            near = part.with_(student_logprobs_N=_nudged(part.student_logprobs_N, nudge))
            for term in terms:
                chosen_C |= term.where(near, context) > 0
        return chosen_C

    return decide


def _nudged(logprobs_N: Tensor, nudge: float) -> Tensor:
    """Log-probabilities after a change of the log-odds log p - log(1 - p)."""
    if not nudge:
        return logprobs_N
    log_odds_N = logprobs_N - torch.log(-torch.expm1(logprobs_N))  # inf where p is 1, and stays it
    return torch.nn.functional.logsigmoid(log_odds_N + nudge)


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
    teacher: Teacher | None = None,
) -> StepSums:
    """Gradient and optimiser step(s) on a scored batch.

    `teacher` scores a micro-batch again where a term reads a top-k that was left out.

    With several updates each is planned on its own share of the rollouts; importance ratios correct for the drift.
    `places` are the rollouts' indices in the batch of all ranks, so that shares do not depend on the number of ranks.
    """
    sums = StepSums()
    places = range(len(batch.rollouts)) if places is None else places
    for u in range(num_updates):
        chosen = [i for i, place in enumerate(places) if place % num_updates == u]
        part = batch if num_updates == 1 else batch.only(chosen)
        _accumulate(part, objective, learner, context, tokens_per_micro_batch, sums, 1.0 / num_updates, watch, teacher)
        norm, sums.learning_rate = learner.update()
        sums.gradient_norms.append(norm)
    return sums


def _with_every_top_k(part: ScoredBatch, objective: Objective, teacher: Teacher) -> ScoredBatch:
    as_read = part.as_read or part.rollouts
    request = ScoreRequest(as_read, Needs.SAMPLED | Needs.TOPK, top_k=objective.teacher_top_k)
    scores = teacher.score(request)
    names = ("teacher_topk_ids_NK", "teacher_topk_logprobs_NK")
    tokens = add_scores(part.tokens, part.rollouts, scores, request.needs)
    return replace(part, tokens=part.tokens.with_(**{name: tokens.peek(name) for name in names}))


def recall_needed(objective: Objective, num_updates: int) -> bool:
    """Whether plans need a separate pass of the student."""
    return objective.reach > Reach.TOKEN or num_updates > 1


def _accumulate(
    batch: ScoredBatch,
    objective: Objective,
    learner: Learner,
    context: Context,
    max_tokens: int,
    sums: StepSums,
    share: float,
    watch: Watch | None,
    teacher: Teacher | None,
) -> None:
    whole: Plan | None = None
    if objective.reach > Reach.TOKEN:
        whole = objective.plan(batch.tokens, context)
    counts: Counts = whole.counts if whole else count(batch.tokens, context)
    groups = similar_lengths([len(r.token_ids) for r in batch.rollouts], max_tokens)
    spare = learner.spare_passes(len(groups), context.world) if context.world.size > 1 else 0
    for chosen in groups:
        part = batch.take(chosen)
        plan = whole.rows(batch.rows_of(chosen)) if whole else None
        try:
            seen = learner.learn(MicroBatch.of(part, objective, context, counts, plan))
        except TopKLeftOut:  # raised by the loss, before any gradient
            if teacher is None:
                raise
            part = _with_every_top_k(part, objective, teacher)
            seen = learner.learn(MicroBatch.of(part, objective, context, counts, plan))
        sums.add(seen.loss, seen.terms, share)
        if watch is not None:
            watch(seen)
    if context.world.size > 1:
        learner.idle(spare)
