"""The teacher's top-k is paid for where a term may read it, and nowhere else; the step is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.integration.runs import parts_of, prepare, step_of, write
from tropd.errors import EvidenceError
from tropd.objective.support import NOTHING
from tropd.probes.sample import sampled_rows
from tropd.step import score, top_k_rows
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
    folder = prepare(tmp_path)
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
    parts = parts_of(prepare(tmp_path), METHODS[0])
    tokens = step_of(parts, write(parts, 0.0)).batch.tokens
    by_teacher_N = tokens.authors_N == Author.TEACHER
    assert bool(by_teacher_N.any())
    assert bool((tokens.teacher_topk_logprobs_NK[by_teacher_N, 0] == NOTHING).all())


def test_a_top_k_that_was_left_out_is_never_read_silently(tmp_path: Path) -> None:
    parts = parts_of(prepare(tmp_path), METHODS[0])
    objective, rollouts = parts.run.method.objective, write(parts)
    batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=True)
    missing = torch.full_like(batch.tokens.teacher_topk_logprobs_NK, NOTHING)
    tokens = batch.tokens.with_(teacher_topk_logprobs_NK=missing)
    view = parts.learner.forward.view(rollouts, tokens, objective.needs)
    with pytest.raises(EvidenceError, match="term 'outlier'.*left out"):
        objective(tokens, view, objective.plan(tokens))


def test_half_precision_students_ask_for_every_row(tmp_path: Path) -> None:
    """Rounding may move their log-probabilities by more than any margin worth its cost."""
    parts = parts_of(prepare(tmp_path), METHODS[0])
    assert top_k_rows(parts.run.method.objective, step_of(parts).batch.tokens, None, None) is None


def test_probes_of_the_support_speak_of_a_random_share_of_all_tokens(tmp_path: Path) -> None:
    """Not of the outliers, for which the top-k was made: those are where the student is off the support."""
    parts = parts_of(prepare(tmp_path), METHODS[0])
    rollouts = write(parts, 0.9)
    step = step_of(parts, rollouts)
    tokens = step.batch.tokens
    there_N = tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING
    student_N = tokens.authors_N == Author.STUDENT
    assert bool(there_N[sampled_rows(tokens) & student_N].all())
    assert 0.02 < float(sampled_rows(tokens).double().mean()) < 0.3
