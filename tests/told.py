"""Small runs whose teacher is told more than the student."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.small_runs import run_of, save_model, write_models, write_rows
from tropd.config.run import Run
from tropd.data.graders import Grade, graded
from tropd.training.assembly import Parts
from tropd.training.scoring import score
from tropd.training.source import Source
from tropd.types import READER, Rollout

COLUMN = {"kind": "column", "column": "solution", "template": "{prompt} ({value})"}
FEEDBACK = {"kind": "feedback", "template": "[{feedback}] {prompt}"}
PEERS = {"kind": "peers", "template": "{peers}; {prompt}", "success": "right {response}", "failure": "wrong {response}"}
SHOWN = {"kind": "demonstrations", "count": 2, "template": "{examples}; {prompt}", "example": "{problem}{solution}"}
WORDS = f"{__file__}:parity"
"""A grader that gives words."""


def parity(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[Grade]:
    """Half of all texts are right, whoever writes them."""
    odd = [sum(text.encode()) % 2 for text in completions]
    return [Grade(reward=float(x), words=f"{('even', 'odd')[x]}, {x} of 1") for x in odd]


def write_world(folder: Path, family: str = "qwen3", **options: Any) -> Path:
    """Models, and sums with the way to them."""
    write_models(folder, family, **options)
    save_model(folder / "copy", family=family, seed=0, **options)
    rows = [
        {
            "prompt": f"{a}+{b}=",
            "answer": str(a + b),
            "solution": f"{b} after {a}",
            "hint": f"begin at {a}",
            "kind": ("even", "odd")[b % 2],
        }
        for a in range(3)
        for b in range(3)
    ]
    write_rows(folder / "told.jsonl", rows)
    return folder


def told(world: Path, briefing: Any = COLUMN, teacher: str = "copy", **changes: Any) -> Run:
    method = changes.pop("method", {"name": "opd"})
    section = {"path": str(world / teacher), "briefing": briefing, **changes.pop("teacher_section", {})}
    data = {"path": str(world / "told.jsonl"), **changes.pop("data", {})}
    return run_of(world, method, kind="quick", **{"teacher": section, "data": data, **changes})


def by_hand(model: Any, ids: tuple[int, ...], response: tuple[int, ...], size: int) -> torch.Tensor:
    """log p(response | ids), token by token, from one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, *response]])).logits[0, len(ids) - 1 : -1, :size].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def scored(parts: Parts) -> tuple[list[Rollout], Any]:
    rollouts = Source(parts).take(0).rollouts
    if parts.grader is not None:
        rollouts = graded(parts.grader, rollouts, parts.tokenizer)
    as_read = parts.briefer.as_read(READER, rollouts)
    objective, learner = parts.run.method.objective, parts.learner
    batch = score(rollouts, objective, parts.teacher, learner, seed=0, recall=True, as_read={READER: as_read})
    return rollouts, batch
