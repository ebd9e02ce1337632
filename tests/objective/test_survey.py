"""The three hardest methods of the survey are compositions: the code of docs/algebra.md runs and does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.objective.cases import close, make_case
from tropd.objective import Context
from tropd.types import Author

TEXT = (Path(__file__).parents[2] / "docs" / "algebra.md").read_text()


@pytest.fixture(scope="module")
def said() -> dict:
    """The objectives that the document builds."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        exec(block, names)
    return names


def test_scope_routes_by_verdict_and_weighs_within_the_group(said):
    case = make_case(3, lengths=(4, 5, 6, 3))
    tokens = case.tokens.with_(
        rewards_S=torch.tensor([1.0, 1.0, 0.0, 1.0]),
        groups_S=torch.tensor([0, 0, 0, 1]),
        authors_N=torch.full_like(case.tokens.authors_N, int(Author.STUDENT)),
        num_actions_S=torch.tensor([4, 5, 6, 3]),
    )
    plan = said["scope"].plan(tokens)
    mean_S = torch.stack([tokens.student_logprobs_N[tokens.sequences_N == s].mean() for s in range(4)])
    share = torch.softmax(-mean_S[:2], 0) * 2
    expected = torch.tensor([float(share[0]), float(share[1]), 0.0, 1.0], dtype=torch.float64) / 18
    close(plan.weights["imitate"], expected[tokens.sequences_N], 1e-9)
    close(plan.weights["distil"], (tokens.sequences_N == 2).double() / 18, 1e-9)


def test_scope_is_the_same_in_any_order(said):
    case = make_case(3)
    order = torch.randperm(len(case.tokens), generator=torch.Generator().manual_seed(0))
    one, other = said["scope"].plan(case.tokens), said["scope"].plan(case.tokens.rows(order))
    for name, weight_N in one.weights.items():
        close(weight_N[order], other.weights[name], 1e-12)


def test_multi_rollout_distillation_reads_the_top_k_only(said):
    objective = said["multi_rollout"]
    assert objective.teacher_top_k == 100
    case = make_case(top_k=11)
    assert bool(torch.isfinite(case.gradient(objective)).all())


def test_ogls_steers_failed_rollouts_and_anchors_successful_ones(said):
    case = make_case()
    plan = said["ogls"].plan(case.tokens, Context())
    passed_N = case.tokens.rewards_S[case.tokens.sequences_N] > 0
    student_N = case.tokens.authors_N == Author.STUDENT
    assert torch.equal(plan.weights["steer"] > 0, student_N & ~passed_N)
    assert torch.equal(plan.weights["anchor"] > 0, student_N & passed_N)
