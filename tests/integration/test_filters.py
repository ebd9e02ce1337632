"""Filters and weights of whole responses look at the whole batch, however a real training step cuts it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.one_step import Step, judge, parts_of, step_of, write
from tests.small_runs import write_models, write_rows
from tropd.types import Rollout

NUMBER, LEFT = 10, 8
SIZES: dict[int, list[int]] = {1: [1] * 10, 2: [2] * 5, 8: [2, 8]}
"""Responses in a micro-batch, and those of all micro-batches of ten."""
METHOD: dict[str, Any] = {"name": "fire", "drop": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    write_rows(
        folder / "data.jsonl", [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(3)]
    )
    return folder


@pytest.fixture(scope="module")
def rollouts(folder: Path) -> list[Rollout]:
    """Ten of one length, so that as many as wanted fit into a micro-batch."""
    parts = parts_of(folder, METHOD, rollout={"num_prompts": 9, "num_rollouts": 2})
    written = write(parts)
    longest = max(len(rollout.token_ids) for rollout in written)
    same = [rollout for rollout in written if len(rollout.token_ids) == longest]
    assert len(same) >= NUMBER
    return same[:NUMBER]


def step_in(folder: Path, rollouts: list[Rollout], size: int, **changes: Any) -> Step:
    tokens = size * len(rollouts[0].token_ids)
    step = step_of(parts_of(folder, METHOD | changes, tokens_per_micro_batch=tokens), rollouts)
    assert sorted(len(part.rollouts) for part, _ in step.seen) == SIZES[size]
    return step


def kept(step: Step) -> set[str]:
    return {name for name, weight_N in step.shares["reverse_kl"].items() if bool(weight_N.any())}


def test_fires_filter_keeps_the_same_four_fifths_with_1_2_and_8_responses_in_a_micro_batch(
    folder: Path, rollouts: list[Rollout]
) -> None:
    steps = {size: step_in(folder, rollouts, size) for size in SIZES}
    tokens = judge(parts_of(folder, METHOD), rollouts).tokens
    means = torch.stack([tokens.teacher_logprobs_N[tokens.sequences_N == s].mean() for s in range(NUMBER)])
    best = {rollouts[s].id for s in means.argsort(descending=True)[:LEFT].tolist()}
    assert {size: kept(step) for size, step in steps.items()} == dict.fromkeys(SIZES, best)
    whole = steps[1].shares["reverse_kl"]
    for step in steps.values():
        assert all(torch.equal(weight_N, whole[name]) for name, weight_N in step.shares["reverse_kl"].items())
        assert step.sums.loss == pytest.approx(steps[1].sums.loss, rel=1e-5)


def test_the_filter_as_released_keeps_everything_whatever_the_micro_batch(
    folder: Path, rollouts: list[Rollout]
) -> None:
    everyone = {rollout.id for rollout in rollouts}
    assert all(kept(step_in(folder, rollouts, size, preset="code")) == everyone for size in SIZES)


def test_weights_with_the_batchs_maxima_are_the_same_in_any_micro_batch(folder: Path, rollouts: list[Rollout]) -> None:
    steps = [step_in(folder, rollouts, size, scope="batch", drop=0.0) for size in SIZES]
    for name, weight_N in steps[0].shares["reverse_kl"].items():
        assert all(torch.equal(step.shares["reverse_kl"][name], weight_N) for step in steps)
    own = step_in(folder, rollouts, 1, drop=0.0).shares["reverse_kl"]
    assert any(not torch.equal(own[name], x) for name, x in steps[0].shares["reverse_kl"].items())
