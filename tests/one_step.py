"""One training step in this process, taken apart: what was written, scored and learnt, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.small_runs import run_of
from tropd.data.graders import graded
from tropd.methods.drafts import RolloutJob
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, StudentView
from tropd.rollout.stage import roll_out
from tropd.run.start import assemble
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.training.micro_batch import Seen
from tropd.training.scoring import score
from tropd.training.source import grade_of
from tropd.training.step import StepSums, recall_needed, train_step
from tropd.types import Rollout


def parts_of(folder: Path, method: Mapping[str, Any] | None = None, **changes: Any) -> Parts:
    return assemble(run_of(folder, method, **changes), folder)


def write(parts: Parts, progress: float = 0.3, seed: int = 5) -> list[Rollout]:
    """The rollouts of one step."""
    run = parts.run
    job = RolloutJob(
        prompts=parts.stream.next(run.rollout.num_prompts),
        num_rollouts=run.rollout.num_rollouts,
        max_new_tokens=run.rollout.max_new_tokens,
        sampling=run.sampling,
        stop_ids=parts.stop_ids,
        seed=seed,
        progress=progress,
        grade=grade_of(parts),
    )
    return roll_out(run.policy, job, parts.engine, parts.writer, parts.pair)


def judge(parts: Parts, rollouts: list[Rollout]) -> ScoredBatch:
    run = parts.run
    objective = parts.objective
    recall = recall_needed(objective, run.optimizer.num_updates)
    if Needs.REWARD in objective.needs:
        assert parts.grader is not None
        rollouts = graded(parts.grader, rollouts, parts.tokenizer)
    return score(rollouts, objective, parts.readers, parts.learner, seed=run.seed, recall=recall)


@dataclass(frozen=True, kw_only=True)
class Step:
    """All that came of one training step."""

    rollouts: list[Rollout]
    batch: ScoredBatch
    sums: StepSums
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    """The student's parameters afterwards."""
    shares: dict[str, dict[str, torch.Tensor]]
    """By term, then by rollout: the weight of each token."""
    seen: list[tuple[ScoredBatch, StudentView]]
    """Micro-batches as they were trained on."""


def step_of(parts: Parts, rollouts: list[Rollout] | None = None, progress: float = 0.3) -> Step:
    """Roll out, score and train once; gradients are those before clipping."""
    rollouts = write(parts, progress) if rollouts is None else rollouts
    batch = judge(parts, rollouts)
    gradients: dict[str, torch.Tensor] = {}
    shares: dict[str, dict[str, torch.Tensor]] = {}
    seen: list[tuple[ScoredBatch, StudentView]] = []

    def watch(judged: Seen) -> None:
        seen.append((judged.part, judged.view))
        for term, by_rollout in judged.weights().items():
            shares.setdefault(term, {}).update(by_rollout)
        gradients.update({n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None})

    sums = train_step(
        batch,
        parts.objective,
        parts.learner,
        Context(progress=progress),
        tokens_per_micro_batch=parts.run.tokens_per_micro_batch,
        num_updates=parts.run.optimizer.num_updates,
        watch=watch,
        teacher=parts.teacher,
    )
    weights = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    return Step(
        rollouts=rollouts, batch=batch, sums=sums, gradients=gradients, weights=weights, shares=shares, seen=seen
    )
