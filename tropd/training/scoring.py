"""What is known about rollouts before they are trained on: the student's evidence, and that of all who read them.

A reader is a teacher and what it is told.  "teacher" reads what every piece reads unless it says otherwise; each reader
is asked only for what some piece reads of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tropd.model.one_pass import can_fuse
from tropd.monitoring.sample import sampled_rows
from tropd.objective.chunks import asked_chunks
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, Tokens
from tropd.objective.lookahead import candidates_of
from tropd.objective.objective import Objective
from tropd.teachers.combined import Combined
from tropd.teachers.teacher import ScoreRequest, Teacher, TopKRows
from tropd.training.asked import by_name
from tropd.training.batches import AsRead, ScoredBatch, add_scores, check_scores, make_tokens
from tropd.training.protocols import Learner
from tropd.types import READER, Author, Rollout, TeacherScores

PASS_NEEDS = Needs.STUDENT_ENTROPY | Needs.STUDENT_TOPK | Needs.REVERSE_KL | Needs.CHUNKS
"""The student's evidence that must exist before the gradient pass."""


def asked_of(objective: Objective, readers: Mapping[str, Teacher]) -> tuple[str, ...]:
    """Everybody who is asked something: those whom pieces read, each after those that it is made of."""
    asked: dict[str, None] = {}

    def ask(name: str) -> None:
        reader = readers[name]
        for part in reader.mixture.readers if isinstance(reader, Combined) else ():
            ask(part)
        asked[name] = None

    for name in objective.readers:
        ask(name)
    return tuple(asked)


def score(
    rollouts: Sequence[Rollout],
    objective: Objective,
    teacher: Teacher | Mapping[str, Teacher],
    learner: Learner,
    *,
    seed: int,
    recall: bool,
    context: Context | None = None,
    scores: Sequence[TeacherScores] | None = None,
    as_read: AsRead | None = None,
) -> ScoredBatch:
    """Join everything known about the rollouts.  `recall`: plan from the student as it is now, not as it will be.

    `teacher` is one, or every reader by its name.  `scores` are those of the reader "teacher", where it has been asked
    already.  `as_read` are the rollouts as each reader reads them: with another prompt before the same responses, or
    None where it does not read one; by default as they are."""
    readers, context = by_name(teacher), context or Context()
    tokens = make_tokens(rollouts, seed, learner.device, learner.vocab_size)
    if context.world.size > 1:  # groups are numbered on each rank, and no group is on two
        tokens = tokens.with_(groups_S=tokens.groups_S * context.world.size + context.world.rank)
    student: dict[str, Tensor] = {}
    if recall or objective.needs & PASS_NEEDS:
        peaks = Needs.STUDENT_ENTROPY if Needs.CHUNKS in objective.needs else Needs.NOTHING
        student = learner.measure(rollouts, objective.needs | peaks, objective.student_top_k)
    tokens, read, measured = tokens.with_(**student), dict(as_read or {}), bool(student)
    asked = asked_of(objective, readers)
    parts = {part for x in map(readers.get, asked) if isinstance(x, Combined) for part in x.mixture.readers}
    margin = 0.0 if student else learner.margin
    for name in asked:
        if isinstance(reader := readers[name], Combined):  # it reads what all its parts read
            each = zip(rollouts, *(read[part] for part in reader.mixture.readers), strict=True)
            read[name] = tuple(None if None in texts else own for own, *texts in each)
        texts = read[name] = tuple(read.get(name) or rollouts)
        reading = _Reading(name, reader, rollouts, texts, objective, name in parts)
        tokens = reading.tell(tokens, learner, context, margin, scores if name == READER else None)
    if Needs.STUDENT_AT_TOPK in objective.needs:
        tokens, measured = _at_top_k(rollouts, objective, learner, tokens), True
    return ScoredBatch(rollouts=tuple(rollouts), tokens=tokens, measured=measured, as_read=read)


def _at_top_k(rollouts: Sequence[Rollout], objective: Objective, learner: Learner, tokens: Tokens) -> Tokens:
    """The tokens with the student's log-probabilities at the readers' likeliest tokens."""
    names = [name for name, needs in objective.asks.items() if Needs.STUDENT_AT_TOPK in needs]
    ids = [tokens.of(name).teacher_topk_ids_NK for name in names]
    found = learner.measure(rollouts, Needs.NOTHING, at_ids_NM=torch.cat(ids, dim=1))
    tokens = tokens.with_(student_logprobs_N=found["student_logprobs_N"])
    for name, at_NK in zip(names, found["at_NM"].split([x.shape[1] for x in ids], dim=1), strict=True):
        tokens = tokens.told(name, student_at_topk_NK=at_NK)
    return tokens


@dataclass(frozen=True, eq=False)
class _Reading:
    """One reader and what it is asked."""

    name: str
    teacher: Teacher
    rollouts: Sequence[Rollout]
    texts: Sequence[Rollout | None]
    objective: Objective
    is_part: bool = False
    """Whether another reader is made of it, which takes its hidden states."""

    @property
    def needs(self) -> Needs:
        part = self.is_part and not isinstance(self.teacher, Combined)
        return self.objective.needs_of(self.name) | (Needs.HIDDEN if part else Needs.NOTHING)

    @property
    def asked(self) -> list[int]:
        """The rollouts that it reads; one at least, so that its answer has a shape and all ranks call together."""
        return [i for i, text in enumerate(self.texts) if text is not None] or [0]

    def tell(
        self,
        tokens: Tokens,
        learner: Learner,
        context: Context,
        margin: float | None,
        scores: Sequence[TeacherScores] | None,
    ) -> Tokens:
        """The tokens with what it says of them."""
        needs, combined = self.needs, isinstance(self.teacher, Combined)
        given = combined or Needs.HIDDEN in self.teacher.capabilities
        if Needs.FULL in needs and given and self.name in learner.expands:
            # whole distributions are made by tiles, where they are read
            needs = (needs & ~Needs.FULL) | (Needs.NOTHING if combined else Needs.HIDDEN)
        if isinstance(self.teacher, Combined):
            top_k = self.objective.top_k_of(self.name)
            tokens = tokens.told(self.name, **self.teacher.evidence(tokens, needs, top_k))
            return self._heard(tokens, learner, context)
        if scores is None or self.is_part:
            looks = Needs.LOOKAHEAD in needs
            how: dict[str, Any] = {
                **asked_chunks(self.objective.audit_of(self.name), tokens),
                "student_topk_ids_TJ": self._by_rollout(tokens.peek("student_topk_ids_NJ")),
                "candidates_TJ": self._by_rollout(candidates_of(self.objective, tokens, self.name) if looks else None),
            }
            if self._shows_top_k(needs):
                more, rows, top_k = needs | Needs.TOPK, partial(_sampled, tokens), self.objective.student_top_k
            else:
                more, top_k = needs, self.objective.top_k_of(self.name)
                rows = top_k_rows(self.objective, tokens, context, margin, self.name)
            scores = self.score(more, top_k_rows=rows, top_k=top_k, **how)
        columns = self.objective.columns_of(self.name)
        tokens = add_scores(tokens, self.rollouts, scores, needs, reader=self.name, columns=columns)
        if Needs.REVERSE_KL in needs:
            tokens = tokens.told(self.name, reverse_kl_N=self._reverse_kl(learner))
        return self._heard(tokens, learner, context)

    def _by_rollout(self, x_N: Tensor | None) -> Sequence[Tensor] | None:
        return None if x_N is None else x_N.split([len(r.response_ids) for r in self.rollouts])

    def _shows_top_k(self, needs: Needs) -> bool:
        """Whether probes get its likeliest tokens beside the student's, for some rows that are in memory anyway."""
        if self.name != READER or self.teacher.forward is None or Needs.TOPK not in self.teacher.capabilities:
            return False
        forward = self.teacher.forward
        some = can_fuse(forward.head) and forward.tiling.tile_vocab is None and Needs.FULL not in needs
        return some and Needs.STUDENT_TOPK in needs and Needs.TOPK not in needs

    def _heard(self, tokens: Tokens, learner: Learner, context: Context) -> Tokens:
        """The tokens with what it read of them."""
        read_S = torch.tensor([text is not None for text in self.texts])
        by_token = tokens.of(self.name).peek("read_N") is not None
        own = torch.tensor([[not bool(read_S.all()), by_token]])
        some_unread, some_by_token = context.world.gather(own).any(0).tolist()  # the same on every rank
        if some_unread:
            tokens = tokens.told(self.name, read_S=read_S.to(learner.device))
        if some_by_token and not by_token:  # this rank's prompts are another teacher's
            every_N = torch.ones_like(tokens.authors_N, dtype=torch.bool)
            tokens = tokens.told(self.name, read_N=every_N, num_read_S=tokens.num_actions_S)
        return tokens

    def score(self, needs: Needs, **how: Any) -> Sequence[TeacherScores]:
        """For every rollout; zeros stand for what it does not read."""
        asked = self.asked
        whole = [text or own for own, text in zip(self.rollouts, self.texts, strict=True)]
        how = {"top_k": self.objective.top_k_of(self.name), "columns": self.objective.columns_of(self.name)} | how
        request = ScoreRequest(whole, needs, **how)
        if len(asked) == len(whole):
            return self.teacher.score(request)
        request = request.take(asked)
        scores = self.teacher.score(request)
        check_scores(request.rollouts, scores, needs)
        found = dict(zip(asked, scores, strict=True))
        return [found[i] if i in found else scores[0].silent(len(r.response_ids)) for i, r in enumerate(self.rollouts)]

    def _reverse_kl(self, learner: Learner) -> Tensor:
        asked = self.asked
        own, texts = [self.rollouts[i] for i in asked], [self.texts[i] or self.rollouts[i] for i in asked]
        rows = learner.reverse_kl(own, self.teacher, texts).split([len(r.response_ids) for r in own])
        found = dict(zip(asked, rows, strict=True))
        lengths = [len(r.response_ids) for r in self.rollouts]
        return torch.cat([found[i] if i in found else rows[0].new_zeros(n) for i, n in enumerate(lengths)])


def with_every_top_k(part: ScoredBatch, objective: Objective, readers: Mapping[str, Teacher]) -> ScoredBatch:
    """The same rollouts, where readers left out no top-k."""
    tokens = part.tokens
    for name in objective.readers:
        if Needs.TOPK not in objective.needs_of(name) or isinstance(readers[name], Combined):
            continue
        texts = part.as_read.get(name) or part.rollouts
        needs = Needs.SAMPLED | Needs.TOPK
        scores = _Reading(name, readers[name], part.rollouts, texts, objective).score(needs)
        again = add_scores(tokens, part.rollouts, scores, needs, reader=name).of(name)
        top_k = ("teacher_topk_ids_NK", "teacher_topk_logprobs_NK")
        tokens = tokens.told(name, **{field: again.peek(field) for field in top_k})
    return replace(part, tokens=tokens)


def _sampled(tokens: Tokens, rows_C: Tensor, teacher_logprobs_C: Tensor | None = None) -> Tensor:
    """The rows for probes: a random eighth of the student's."""
    part = tokens.rows(rows_C.to(tokens.token_ids_N.device))
    return sampled_rows(part) & (part.authors_N == Author.STUDENT)


def top_k_rows(
    objective: Objective, tokens: Tokens, context: Context, margin: float | None, reader: str = READER
) -> TopKRows | None:
    """Which rows' top-k a term may read, decided while the teacher's tile is in memory; None if that cannot be known.

    The student's log-probabilities are those of the rollouts, so a row counts if it would count anywhere within the
    margin.  The margin is in log-odds: a sure token stays sure, whatever the rounding of its logits.  A random eighth
    of the rows is added, so that probes of the support cover all tokens.
    """
    terms = [term for term in objective.terms if Needs.TOPK in term.asks.get(reader, Needs.NOTHING)]
    simple = all(t.where.asks().keys() <= {reader, READER} and t.where.reach == Reach.TOKEN for t in terms)
    simple &= all(needs in (Needs.NOTHING, Needs.SAMPLED) for t in terms for needs in t.where.asks().values())
    simple &= not any(t.loss.reward is not None and Needs.TOPK in t.loss.reward.needs for t in terms)
    if not terms or not simple or margin is None or tokens.peek("student_logprobs_N") is None:
        return None

    def decide(rows_C: Tensor, teacher_logprobs_C: Tensor) -> Tensor:
        part = tokens.rows(rows_C.to(tokens.token_ids_N.device)).told(reader, teacher_logprobs_N=teacher_logprobs_C)
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
