"""A teacher in this process says what lies beyond candidates; others refuse to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.model.cases import rollouts_of
from tests.model.test_lookahead import by_hand, candidates_of
from tests.one_step import judge, parts_of, write
from tests.small_runs import write_models
from tests.tiny import VOCAB, tiny_model
from tropd.errors import EvidenceError
from tropd.methods import LGR
from tropd.model import hf
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs
from tropd.objective.support import NOTHING
from tropd.servers.dialects import DIALECTS
from tropd.teachers.local import LocalTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.training.asked import check_evidence
from tropd.types import READER, Author


@pytest.mark.parametrize("mask_driven", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_a_teacher_scores_as_ever_and_says_what_lies_beyond(family: str, mask_driven: bool, monkeypatch) -> None:
    if not mask_driven:
        monkeypatch.setattr(hf, "MASK_DRIVEN", ())
    model, rollouts = tiny_model(family, sharp=4.0), rollouts_of()
    teacher = LocalTeacher(model, vocab_size=VOCAB, tiling=Tiling(tokens_per_batch=32))
    ids = candidates_of(rollouts)
    plain = teacher.score(ScoreRequest(rollouts))
    scores = teacher.score(ScoreRequest(rollouts, Needs.SAMPLED | Needs.LOOKAHEAD, candidates_TJ=ids))
    assert teacher.branches is mask_driven
    for score, before, rollout, ids_TJ in zip(scores, plain, rollouts, ids, strict=True):
        assert torch.equal(score.logprobs_T, before.logprobs_T) and before.lookahead_TJ is None
        torch.testing.assert_close(score.lookahead_TJ, by_hand(model, rollout, ids_TJ), rtol=0, atol=1e-4)


def test_one_of_several_teachers_looks_beyond_its_own_texts() -> None:
    rollouts = [
        dataclasses.replace(r, prompt=dataclasses.replace(r.prompt, teacher="ab"[i % 2]))
        for i, r in enumerate(rollouts_of())
    ]
    models = {name: tiny_model(seed=seed, sharp=4.0) for seed, name in enumerate("ab")}
    ids = candidates_of(rollouts)
    request = ScoreRequest(rollouts, Needs.SAMPLED | Needs.LOOKAHEAD, candidates_TJ=ids)
    scores = Routed({name: LocalTeacher(model) for name, model in models.items()}).score(request)
    for score, rollout, ids_TJ in zip(scores, rollouts, ids, strict=True):
        expected = by_hand(models[rollout.prompt.teacher], rollout, ids_TJ)
        torch.testing.assert_close(score.lookahead_TJ, expected, rtol=0, atol=1e-4)


def test_candidates_that_are_not_given_are_an_error() -> None:
    with pytest.raises(EvidenceError, match=r"without candidates; give candidates_TJ"):
        LocalTeacher(tiny_model()).score(ScoreRequest(rollouts_of(), Needs.LOOKAHEAD))


def test_no_server_looks_ahead_and_a_method_that_does_is_refused_before_the_first_step() -> None:
    assert not any(Needs.LOOKAHEAD in dialect.capabilities for dialect in DIALECTS.values())
    served = Teacher()
    served.capabilities = ~Needs.LOOKAHEAD
    with pytest.raises(EvidenceError, match=r"'lgr' needs LOOKAHEAD from the teacher"):
        check_evidence(LGR().objective, {READER: served}, "lgr", grader=False)


def test_a_step_looks_beyond_the_students_candidates_where_it_is_uncertain(tmp_path: Path) -> None:
    parts = parts_of(write_models(tmp_path), {"name": "lgr", "top_k": 3, "nats": 1.0})
    batch = judge(parts, write(parts))
    tokens, teacher = batch.tokens, parts.teacher.forward
    assert teacher is not None
    asked_N = (tokens.authors_N == Author.STUDENT) & (tokens.student_entropy_N > 1.0)
    assert torch.equal(tokens.teacher_lookahead_NJ[:, 0] > NOTHING, asked_N) and bool(asked_N.any())
    ids = tokens.student_topk_ids_NJ[:, :3].masked_fill(~asked_N[:, None], -1)
    expected = [
        by_hand(teacher.model, rollout, ids_TJ)
        for rollout, ids_TJ in zip(
            batch.rollouts, ids.split([len(r.response_ids) for r in batch.rollouts]), strict=True
        )
    ]
    torch.testing.assert_close(tokens.teacher_lookahead_NJ, torch.cat(expected), rtol=0, atol=1e-3)
