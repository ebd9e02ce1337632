"""The teacher's top-k is paid for where a term may read it, and nowhere else; the step is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.one_step import parts_of, step_of, write
from tests.small_runs import write_models
from tropd.errors import EvidenceError
from tropd.monitoring.sample import sampled_rows
from tropd.objective import Context, Needs, Objective, PolicyGradient, Selector, Term, Tokens
from tropd.objective.selectors import STUDENT, as_weight
from tropd.objective.support import NOTHING
from tropd.training.scoring import score
from tropd.types import Author

METHODS = [
    {"name": "tropd", "top_k": 8, "prefix": {"start": 0.5}},
    {"name": "tropd", "top_k": 8, "trust": "threshold", "trust_threshold": 0.5},
    {"name": "tropd_aopd", "tropd": {"top_k": 8}},
    {"name": "aopd", "top_k": 8},
    {"name": "full_fkl", "top_k": 8},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: "-".join(map(str, m.values()))[:30])
def test_a_step_is_the_same_as_with_the_top_k_of_every_token(tmp_path: Path, method: dict) -> None:
    folder = write_models(tmp_path)
    rollouts = write(parts_of(folder, method))
    few, all_of_it = parts_of(folder, method), parts_of(folder, method)
    all_of_it.learner.margin = None
    a, b = step_of(few, rollouts), step_of(all_of_it, rollouts)
    known_a, known_b = ((s.batch.tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING).sum() for s in (a, b))
    assert int(known_b) == len(b.batch.tokens) and int(known_a) > 0
    if method["name"] != "full_fkl":
        assert int(known_a) < int(known_b)
    assert a.sums.loss == b.sums.loss
    for name, gradient in a.gradients.items():
        assert torch.equal(gradient, b.gradients[name])


def test_tokens_that_the_teacher_wrote_cost_no_top_k(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), METHODS[0])
    tokens = step_of(parts, write(parts, 0.0)).batch.tokens
    by_teacher_N = tokens.authors_N == Author.TEACHER
    assert bool(by_teacher_N.any())
    assert bool((tokens.teacher_topk_logprobs_NK[by_teacher_N, 0] == NOTHING).all())


def test_a_top_k_that_was_left_out_is_never_read_silently(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), METHODS[0])
    objective, rollouts = parts.run.method.objective, write(parts)
    batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=True)
    missing = torch.full_like(batch.tokens.teacher_topk_logprobs_NK, NOTHING)
    tokens = batch.tokens.with_(teacher_topk_logprobs_NK=missing)
    view = parts.learner.forward.view(rollouts, tokens, objective.needs)
    with pytest.raises(EvidenceError, match="term 'outlier'.*left out"):
        objective(tokens, view, objective.plan(tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_students_ask_for_few_rows_and_again_where_those_do_not_do(tmp_path: Path, dtype: str) -> None:
    folder, half = write_models(tmp_path), {"student": {"dtype": dtype}, "teacher": {"dtype": dtype}}
    rollouts = write(parts_of(folder, METHODS[1], **half))
    few, again, all_of_it = (parts_of(folder, METHODS[1], **half) for _ in range(3))
    again.learner.margin, all_of_it.learner.margin = 0.0, None
    steps = [step_of(parts, rollouts) for parts in (few, again, all_of_it)]
    known = [int((s.batch.tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING).sum()) for s in steps]
    assert known[1] <= known[0] < known[2] == len(steps[2].batch.tokens)
    for step in steps[:2]:
        assert step.sums.loss == steps[2].sums.loss
        for name, gradient in step.gradients.items():
            assert torch.equal(gradient, steps[2].gradients[name])


def test_a_micro_batch_whose_top_k_was_left_out_is_scored_again(tmp_path: Path) -> None:
    """Rollouts that say that the student is sure of every token it wrote leave no outliers to ask for."""
    parts = parts_of(folder := write_models(tmp_path), METHODS[1])
    truth = write(parts)
    wrong = [replace(r, model_logprobs=(-30.0,) * len(r.token_ids)) for r in truth]
    a, b = step_of(parts, wrong), step_of(parts_of(folder, METHODS[1]), truth)
    known = [int((s.batch.tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING).sum()) for s in (a, b)]
    assert known[0] < known[1]
    for name, gradient in a.gradients.items():
        assert torch.equal(gradient, b.gradients[name])


def test_probes_of_the_support_speak_of_a_random_share_of_all_tokens(tmp_path: Path) -> None:
    """Not of the outliers, for which the top-k was made: those are where the student is off the support."""
    parts = parts_of(write_models(tmp_path), METHODS[0])
    rollouts = write(parts, 0.9)
    step = step_of(parts, rollouts)
    tokens = step.batch.tokens
    there_N = tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING
    student_N = tokens.authors_N == Author.STUDENT
    assert bool(there_N[sampled_rows(tokens) & student_N].all())
    assert 0.02 < float(sampled_rows(tokens).double().mean()) < 0.3


@dataclass(frozen=True)
class Sure(Selector):
    """Where the teacher's `teacher_top_k` likeliest tokens hold more than half of its probability."""

    teacher_top_k: int = 5
    own_needs = Needs.TOPK

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.teacher_topk_logprobs_NK.exp().sum(-1) > 0.5, tokens.teacher_logprobs_N)


@dataclass(frozen=True)
class Known(Selector):
    """Where the teacher gives the student's likeliest tokens more than a tenth."""

    student_top_k: int = 3
    own_needs = Needs.STUDENT_TOPK

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.teacher_at_student_topk_NJ.exp().sum(-1) > 0.1, tokens.teacher_logprobs_N)


def test_a_selector_reads_the_top_k_of_every_token_though_no_loss_does(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), {"name": "opd"})
    rollouts = write(parts)
    objective = Objective(Term("t", STUDENT & (Sure() | Known()), PolicyGradient()))
    batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=False)
    assert batch.tokens.teacher_topk_ids_NK.shape[1] == 5 and batch.tokens.student_topk_ids_NJ.shape[1] == 3
    assert bool((batch.tokens.teacher_topk_logprobs_NK > NOTHING).all())
    weights = objective.plan(batch.tokens).weights["t"]
    assert 0 < int((weights > 0).sum()) < len(weights)
