"""The overlap of the likeliest tokens, in every run that has a top-k: by hand, and against both models' own top-k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.monitoring.test_probes import S, make_tokens, probes_of
from tests.one_step import judge, parts_of, write
from tests.small_runs import write_models
from tropd.distributed.ranks import ALONE
from tropd.model.forward import Forward
from tropd.monitoring.overlap import shared
from tropd.monitoring.sample import sampled_rows
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.objective.support import NOTHING
from tropd.teachers.teacher import ScoreRequest
from tropd.training.batches import add_scores
from tropd.training.step import train_step
from tropd.training.watched import Watched
from tropd.types import Author, Rollout

NAMES = ("overlap/top_k", "mass/teacher_shared", "mass/student_shared")
METHODS: dict[str, dict[str, Any]] = {
    "teacher's top-k, for outliers": {"name": "tropd", "top_k": 8, "prefix": {"start": 0.5}},
    "teacher's top-k, for all tokens": {"name": "full_fkl", "top_k": 8},
    "student's top-k": {"name": "cgtr", "top_k": 8},
    "both": {"name": "many_faces", "support": "union", "top_k": 8},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def top_k_of(forward: Forward | None, rollouts: list[Rollout]) -> tuple[torch.Tensor, torch.Tensor]:
    assert forward is not None
    found = forward.measure(rollouts, Needs.NOTHING, top_k=8)
    assert found.topk_ids_NK is not None and found.topk_logprobs_NK is not None
    return found.topk_ids_NK, found.topk_logprobs_NK


TILES: dict[str, dict[str, Any]] = {"whole": {}, "tiles": {"tile_tokens": 7}, "lean": {"tile_vocab": 50}}


@pytest.mark.parametrize(
    ("method", "tiles"),
    [(m, t) for m in METHODS for t in TILES if (m, t) != ("student's top-k", "lean")],
)
def test_it_is_that_of_both_models_own_top_k(folder: Path, method: str, tiles: str) -> None:
    parts = parts_of(folder, METHODS[method], **TILES[tiles])
    rollouts = write(parts, 0.9)
    batch = judge(parts, rollouts)
    own_ids_NK, own_NK = top_k_of(parts.learner.forward, rollouts)
    their_ids_NK, theirs_NK = top_k_of(parts.teacher.forward, rollouts)
    watched = Watched(batch, parts.run.sampling)
    train_step(
        batch,
        parts.run.method.objective,
        parts.learner,
        Context(progress=0.3),
        tokens_per_micro_batch=parts.run.tokens_per_micro_batch,
        watch=watched,
        teacher=parts.readers,
    )
    found = watched.probes(ALONE)
    rows_N = batch.tokens.authors_N == Author.STUDENT
    if method != "both":
        rows_N &= sampled_rows(batch.tokens)
    both_NKJ = their_ids_NK[:, :, None] == own_ids_NK[:, None, :]
    expected = (
        both_NKJ.any(2).double().mean(1),
        (theirs_NK.exp() * both_NKJ.any(2)).sum(1),
        (own_NK.exp() * both_NKJ.any(1)).sum(1),
    )
    assert int(rows_N.sum()) > 0 and 0.0 < float(expected[0][rows_N].mean()) < 1.0
    for name, number_N in zip(NAMES, expected, strict=True):
        assert found[name] == pytest.approx(float(number_N[rows_N].double().mean()), rel=1e-5), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_teacher_says_does_not_depend_on_the_top_k_that_probes_get(folder: Path, dtype: str) -> None:
    parts = parts_of(folder, METHODS["student's top-k"], teacher={"dtype": dtype})
    rollouts = write(parts, 0.9)
    tokens = judge(parts, rollouts).tokens
    ids_TJ = tokens.student_topk_ids_NJ.split([len(r.response_ids) for r in rollouts])
    request = ScoreRequest(rollouts, Needs.SAMPLED | Needs.STUDENT_TOPK, student_topk_ids_TJ=ids_TJ)
    alone = add_scores(tokens, rollouts, parts.teacher.score(request))
    known_N = tokens.teacher_topk_logprobs_NK[:, 0] > NOTHING
    assert torch.equal(known_N, sampled_rows(tokens) & (tokens.authors_N == Author.STUDENT)) and bool(known_N.any())
    for name in ("teacher_logprobs_N", "teacher_at_student_topk_NJ"):
        assert torch.equal(getattr(alone, name), getattr(tokens, name)), name


def test_shared_masses_by_hand() -> None:
    tokens = make_tokens(
        [S, S],
        [0, 0],
        teacher_topk_ids_NK=torch.tensor([[5, 1, 9], [2, 3, 4]]),
        teacher_topk_logprobs_NK=torch.tensor([[0.5, 0.25, 0.125], [0.6, 0.2, 0.1]]).log(),
    )
    at_teachers = torch.tensor([[0.25, 0.5, 0.0], [0.05, 0.05, 0.3]]).log()
    own_NJ = torch.tensor([[1, 5, 7], [4, 8, 0]])
    probes = probes_of(tokens, topk_logprobs_NK=at_teachers, own_topk_ids_NJ=own_NJ)
    assert probes["overlap/top_k"] == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert probes["mass/teacher_shared"] == pytest.approx((0.75 + 0.1) / 2)
    assert probes["mass/student_shared"] == pytest.approx((0.75 + 0.3) / 2)
    own_NJ[1] = -1
    probes = probes_of(tokens, topk_logprobs_NK=at_teachers, own_topk_ids_NJ=own_NJ)
    assert probes["overlap/top_k"] == pytest.approx(2 / 3), "a row that was not looked at says nothing"
    assert probes["mass/student_in_teacher_top_k"] == pytest.approx((0.75 + 0.4) / 2)


def test_shared_ids_are_found_whatever_their_order_and_number() -> None:
    a, b = torch.tensor([[3, 1, 2], [9, 8, 7]]), torch.tensor([[2, 5], [10, 11]])
    assert shared(a, b).tolist() == [[False, False, True], [False, False, False]]
    assert shared(b, a).tolist() == [[True, False], [False, False]]
    assert shared(a, b[:, :0]).tolist() == [[False] * 3] * 2 and shared(a[:0], b[:0]).shape == (0, 3)
