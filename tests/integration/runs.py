"""Small real runs on disk: two tiny models, a byte tokenizer, twenty sums, and the TOML that ties them together."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
import torch

from tests.tiny import byte_tokenizer, tiny_model
from tropd.config import file as config_file
from tropd.config.run import Run
from tropd.methods.drafts import RolloutJob
from tropd.objective.evidence import StudentView
from tropd.objective.terms import Context
from tropd.rollout.stage import roll_out
from tropd.run.start import assemble
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.training.micro_batch import Seen
from tropd.training.step import StepSums, recall_needed, score, train_step
from tropd.types import Rollout

NEW_TOKENS = 28
TROPD = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 0.4}, "beta": 0.1}


def save_model(folder: Path, model: Any) -> Path:
    """A model with its tokenizer, as a checkpoint of transformers."""
    tokenizer = byte_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prepare(folder: Path, family: str = "qwen3", tied: bool = True, teacher: Any = None) -> Path:
    """A folder with student, teacher and data; the teacher is another random model unless given."""
    save_model(folder / "student", tiny_model(family, seed=0, tied=tied))
    save_model(folder / "teacher", tiny_model(family, seed=1, tied=tied) if teacher is None else teacher)
    rows = [{"prompt": f"{a}+{b}" + "=" * (1 + a), "answer": str(a + b)} for a in range(5) for b in range(4)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run_in(folder: Path, method: Mapping[str, Any] = TROPD, **changes: Any) -> Run:
    """The run that a TOML file in a prepared folder describes; tables in `changes` are merged key by key."""
    values: dict[str, Any] = {
        "steps": 3,
        "output": str(folder / "run"),
        "grader": "exact",
        "device": "cpu",
        "tokens_per_micro_batch": 128,
        "student": {"path": str(folder / "student")},
        "teacher": {"path": str(folder / "teacher")},
        "data": {"path": str(folder / "data.jsonl")},
        "method": dict(method),
        "rollout": {"num_prompts": 3, "num_rollouts": 2, "max_new_tokens": NEW_TOKENS, "save_every": 1},
        "optimizer": {"learning_rate": 1e-3},
        "checkpoint": {"every": 1, "keep": 9},
    }
    for name, change in changes.items():
        values[name] = {**values[name], **change} if isinstance(values.get(name), dict) else change
    path = folder / "asked.toml"
    path.write_text(tomli_w.dumps(values))
    return config_file.load(path)


def parts_of(folder: Path, method: Mapping[str, Any] = TROPD, **changes: Any) -> Parts:
    return assemble(run_in(folder, method, **changes), folder)


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
    )
    return roll_out(run.method.rollout, job, parts.engine, parts.writer)


def judge(parts: Parts, rollouts: list[Rollout]) -> ScoredBatch:
    run = parts.run
    recall = recall_needed(run.method.objective, run.optimizer.num_updates)
    return score(rollouts, run.method.objective, parts.teacher, parts.learner, seed=run.seed, recall=recall)


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
        parts.run.method.objective,
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
