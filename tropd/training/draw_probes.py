"""Probes of how servers draw: from rollouts that the trainer scores, and from texts that a teacher wrote and scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tropd.monitoring.chunks import probes_of_chunks
from tropd.objective.heard import as_heard
from tropd.rollout import draws
from tropd.rollout.draw_check import MOST_TOKENS, alike
from tropd.rollout.draw_check import read as read_draws
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.types import READER, Author, Rollout, Sampling


def probes_of_student(parts: Parts, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Probes of a step's rollouts, of all ranks, before the student is trained on them.  With staleness an older
    student wrote them; then servers draw after a known text at every update instead."""
    run, world = parts.run, parts.world
    if not run.rollout.servers:
        return {}
    fresh = rollouts if run.rollout.staleness == 0 else ()
    own = read_draws(parts.learner.forward, fresh, run.sampling, run.tokens_per_micro_batch)
    told = world.gather_json([own.evidence, own.tokens, own.surprise, own.entropy, alike(rollouts)])
    evidence, tokens = draws.total(part[0] for part in told), sum(part[1] for part in told)
    probes = {f"draws/student/{name}": nats for name, nats in evidence.items()}
    probes["draws/alike"] = max(part[4] for part in told)
    if tokens:
        probes["draws/surprise"] = sum(part[2] for part in told) / tokens
        probes["draws/entropy"] = sum(part[3] for part in told) / tokens
    return probes


def probes_of_teacher(parts: Parts, batch: ScoredBatch) -> dict[str, float]:
    """Probes of what the teacher wrote: its continuations, if it only writes, else the texts that its servers drew, on
    the first visit to a prompt, because later visits repeat them."""
    run, tokens = parts.run, batch.tokens
    if (audit := parts.objective.audit_of(READER)) is not None:
        return probes_of_chunks(tokens, audit, parts.world)
    drawn = {n for n, t in run.all_teachers.items() if t.servers and not t.chats}
    if not drawn or run.rollout.teacher_sampling != Sampling():
        return {}
    evidence: draws.Evidence = {}
    if tokens.peek("teacher_topk_logprobs_NK") is not None:
        chosen = _first_texts([r for r in batch.rollouts if r.prompt.teacher in drawn and not r.prompt.response_ids])
        rows_N = batch.rows_of([n for n, r in enumerate(batch.rollouts) if r.id in chosen])
        rows_N = rows_N[(as_heard(tokens, [tokens.reader]).authors_N == Author.TEACHER)[rows_N]][:MOST_TOKENS]
        rows_N = rows_N[~torch.isin(tokens.token_ids_N[rows_N], torch.tensor(parts.stop_ids).to(rows_N))]
        fields = ("token_ids_N", "teacher_logprobs_N", "teacher_topk_ids_NK", "teacher_topk_logprobs_NK")
        evidence = draws.evidence_of_rows(*(getattr(tokens, name)[rows_N] for name in fields), never=parts.stop_ids)
    told = parts.world.gather_json(evidence)
    return {f"draws/teacher/{name}": nats for name, nats in draws.total(told).items()}


def _first_texts(rollouts: Sequence[Rollout]) -> set[str]:
    """Rollouts of a first visit with the longest text of the teacher's; texts that several share count once."""
    longest: dict[tuple[int, ...], Rollout] = {}
    for rollout in sorted(rollouts, key=lambda r: -r.authors.count(Author.TEACHER)):
        text = tuple(i for i, a in zip(rollout.token_ids, rollout.authors, strict=True) if a != Author.STUDENT)
        if rollout.id.startswith("0/") and not any(known[: len(text)] == text for known in longest):
            longest[text] = rollout
    return {rollout.id for rollout in longest.values()}
