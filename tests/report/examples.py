"""Records and rollouts to write, as a small run would make them."""

from __future__ import annotations

from typing import Any

from tropd.types import Author, Finish, Prompt, Rollout, StepRecord, TermStats


def step_record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "progress": step / 10,
        "policy_version": step,
        "loss": 0.5,
        "terms": {"trusted": TermStats(loss=0.4, tokens=90.0, weight=88.5)},
        "probes": {"trust/share": 0.9, "reward/mean": 0.25},
        "gradient_norm": 12.5,
        "learning_rate": 1e-5,
        "tokens": {"student": 90, "teacher": 10},
        "seconds": {"rollout": 2.0, "score": 1.0, "train": 1.0},
    }
    return StepRecord(**{**values, **changes})


def rollout(name: str, prompt_ids: tuple[int, ...], response_ids: tuple[int, ...]) -> Rollout:
    """The teacher writes the first token of the response, the student the others."""
    students = len(response_ids) - 1
    return Rollout(
        id=name,
        prompt=Prompt(id=f"prompt-{name}", token_ids=prompt_ids),
        token_ids=prompt_ids + response_ids,
        authors=(Author.CONTEXT,) * len(prompt_ids) + (Author.TEACHER,) + (Author.STUDENT,) * students,
        behavior_logprobs=(0.0,) * (len(prompt_ids) + 1) + tuple(-0.5 * (i + 1) for i in range(students)),
        policy_version=(3, 4),
        finish=Finish.LENGTH,
        reward=1.0,
    )
