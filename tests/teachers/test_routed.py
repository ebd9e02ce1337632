"""Several teachers: each prompt is scored by its own, and by nobody else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import VOCAB, tiny_model
from tropd.errors import ConfigError, DataError
from tropd.objective.evidence import Needs
from tropd.objective.support import NOTHING
from tropd.teachers.cached import Cached
from tropd.teachers.local import LocalTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.teacher import ScoreRequest
from tropd.testing import some_rollouts
from tropd.types import Rollout

BOTH = Needs.SAMPLED | Needs.TOPK


def both() -> dict[str, LocalTeacher]:
    return {name: LocalTeacher(tiny_model(seed=n, sharp=4.0), name=name) for n, name in enumerate(("math", "code"))}


def rollouts_for(*names: str) -> list[Rollout]:
    rollouts = some_rollouts(VOCAB)[: len(names)]
    return [replace(r, prompt=replace(r.prompt, teacher=name)) for r, name in zip(rollouts, names, strict=True)]


def test_each_prompt_is_scored_by_its_own_teacher_in_order() -> None:
    teachers, rollouts = both(), rollouts_for("code", "math", "code", "code", "math")
    ids_TJ = [torch.arange(3).expand(len(r.response_ids), 3) + n for n, r in enumerate(rollouts)]
    needs = BOTH | Needs.STUDENT_TOPK
    found = Routed(teachers).score(ScoreRequest(rollouts, needs, top_k=4, student_topk_ids_TJ=ids_TJ))
    for rollout, score, ids in zip(rollouts, found, ids_TJ, strict=True):
        name = rollout.prompt.teacher
        (alone,) = teachers[name].score(ScoreRequest([rollout], needs, top_k=4, student_topk_ids_TJ=[ids]))
        assert score.teacher == name
        torch.testing.assert_close(score.logprobs_T, alone.logprobs_T)
        torch.testing.assert_close(score.at_student_topk_TJ, alone.at_student_topk_TJ)
        torch.testing.assert_close(score.topk_logprobs_TK, alone.topk_logprobs_TK)


def test_rows_that_need_no_top_k_are_asked_by_their_place_among_all() -> None:
    rollouts = rollouts_for("code", "math", "code", "code")
    lengths = [len(r.response_ids) for r in rollouts]
    wanted_N = torch.arange(sum(lengths)) % 3 == 0
    found = Routed(both()).score(ScoreRequest(rollouts, BOTH, top_k=4, top_k_rows=lambda rows_C, _: wanted_N[rows_C]))
    for score, wanted_T in zip(found, wanted_N.split(lengths), strict=True):
        assert score.topk_logprobs_TK is not None
        assert torch.equal((score.topk_logprobs_TK > NOTHING).all(-1), wanted_T)


def test_it_offers_what_all_offer_and_names_who_is_missing(tmp_path: Path) -> None:
    teachers = both()
    kept = Cached(teachers["code"], tmp_path / "scores.sqlite", "code")
    routed = Routed({"math": teachers["math"], "code": kept})
    assert routed.capabilities == kept.capabilities
    with pytest.raises(DataError, match=r"ask for the teachers 'art', but there are only 'math', 'code'"):
        routed.score(ScoreRequest(rollouts_for("math", "art")))
    with pytest.raises(ConfigError, match="none was given"):
        Routed({})
