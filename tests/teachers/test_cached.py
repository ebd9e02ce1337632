"""A teacher's scores on disk: what is kept is what was said, and nobody else's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import VOCAB, tiny_model
from tropd.errors import EvidenceError, TeacherError
from tropd.objective.evidence import Needs
from tropd.teachers.cached import Cached
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.testing import some_rollouts
from tropd.types import Rollout, TeacherScores

BOTH = Needs.SAMPLED | Needs.TOPK


class Counting(LocalTeacher):
    """Notes what it was asked."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(tiny_model(seed=seed, sharp=4.0))
        self.asked: list[str] = []

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        self.asked += [rollout.id for rollout in request.rollouts]
        return super().score(request)


def same(found: Sequence[TeacherScores], expected: Sequence[TeacherScores]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.logprobs_T, b.logprobs_T) and a.teacher == b.teacher
        assert (a.topk_ids_TK is None) == (b.topk_ids_TK is None)
        if a.topk_ids_TK is not None and a.topk_logprobs_TK is not None and b.topk_logprobs_TK is not None:
            assert torch.equal(a.topk_ids_TK, torch.as_tensor(b.topk_ids_TK))
            assert torch.equal(a.topk_logprobs_TK, b.topk_logprobs_TK)


def test_a_text_is_scored_once_even_by_another_process_and_to_the_last_bit(tmp_path: Path) -> None:
    teacher, rollouts = Counting(), some_rollouts(VOCAB)
    first = Cached(teacher, tmp_path / "scores.sqlite", "one").score(ScoreRequest(rollouts[:3] * 2, BOTH, top_k=4))
    assert sorted(teacher.asked) == ["r0", "r1", "r2"]
    again = Cached(teacher, tmp_path / "scores.sqlite", "one").score(ScoreRequest(rollouts, BOTH, top_k=4))
    assert sorted(teacher.asked) == ["r0", "r1", "r2", "r3", "r4"]
    same(again[:3], first[3:])


def test_whatever_changes_a_score_is_part_of_its_key(tmp_path: Path) -> None:
    teacher = Counting()
    (rollout,) = some_rollouts(VOCAB, [(3, 6)])
    Cached(teacher, tmp_path / "scores.sqlite", "one").score(ScoreRequest([rollout], BOTH, top_k=4))
    longer = replace(rollout, prompt=replace(rollout.prompt, token_ids=rollout.token_ids[:4]))
    other = replace(rollout, token_ids=(*rollout.token_ids[:-1], (rollout.token_ids[-1] + 1) % VOCAB))
    asks: list[tuple[str, Rollout, Needs, int]] = [
        ("one", rollout, BOTH, 5),
        ("one", rollout, Needs.SAMPLED, 0),
        ("one", rollout, BOTH | Needs.TEACHER_ENTROPY, 4),
        ("one", other, BOTH, 4),
        ("one", longer, BOTH, 4),
        ("two", rollout, BOTH, 4),
    ]
    for number, (identity, asked, needs, top_k) in enumerate(asks):
        Cached(teacher, tmp_path / "scores.sqlite", identity).score(ScoreRequest([asked], needs, top_k=top_k))
        assert len(teacher.asked) == 2 + number


def test_what_is_too_large_to_keep_is_refused_and_damage_is_named(tmp_path: Path) -> None:
    path, rollouts = tmp_path / "scores.sqlite", some_rollouts(VOCAB)
    kept = Cached(Counting(), path, "one")
    for needs in (Needs.FULL, Needs.HIDDEN, Needs.STUDENT_TOPK):
        with pytest.raises(EvidenceError, match="asked of teacher default, which gives"):
            kept.score(ScoreRequest(rollouts, needs))
    kept.score(ScoreRequest(rollouts, BOTH, top_k=4))
    kept.db.execute("UPDATE scores SET score = ?", (b"junk",))
    kept.db.commit()
    with pytest.raises(
        TeacherError, match=r"scores.sqlite, cannot be read.*score_cache = false in that teacher's section"
    ):
        kept.score(ScoreRequest(rollouts, BOTH, top_k=4))
    kept.close()
    path.write_bytes(b"no database at all, but long enough to be looked at" * 50)
    with pytest.raises(TeacherError, match="cannot be opened"):
        Cached(Counting(), path, "one")
