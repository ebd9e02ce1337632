"""What a teacher is asked, and what it may leave to the defaults."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import VOCAB, tiny_model
from tropd.errors import EvidenceError
from tropd.objective.evidence import Needs
from tropd.teachers.local import LocalTeacher
from tropd.teachers.routed import Routed
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.testing import some_rollouts
from tropd.types import TeacherScores


class Flat(Teacher):
    """Knows nothing: every token is as likely as every other."""

    capabilities = Needs.SAMPLED

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        nats = -torch.tensor(float(VOCAB)).log()
        return [TeacherScores(logprobs_T=nats.expand(len(r.response_ids))) for r in request.rollouts]


def test_a_request_about_some_of_the_rollouts_asks_the_same_of_each() -> None:
    rollouts = some_rollouts(VOCAB)
    lengths = [len(r.response_ids) for r in rollouts]
    ids_TJ = [torch.full((length, 2), n) for n, length in enumerate(lengths)]
    wanted_N = torch.arange(sum(lengths)) % 3 == 0
    request = ScoreRequest(
        rollouts, Needs.TOPK, top_k=4, student_topk_ids_TJ=ids_TJ, top_k_rows=lambda rows_C, _: wanted_N[rows_C]
    )
    chosen = [3, 0, 4]
    part = request.take(chosen)
    assert part.rollouts == [rollouts[i] for i in chosen] and (part.needs, part.top_k) == (Needs.TOPK, 4)
    assert part.student_topk_ids_TJ is not None and part.top_k_rows is not None
    assert all(torch.equal(ids, ids_TJ[i]) for ids, i in zip(part.student_topk_ids_TJ, chosen, strict=True))
    rows_N = torch.arange(sum(lengths[i] for i in chosen))
    by_rollout = wanted_N.split(lengths)
    assert torch.equal(part.top_k_rows(rows_N, rows_N), torch.cat([by_rollout[i] for i in chosen]))
    assert torch.equal(part.top_k_rows(rows_N[2:3], rows_N), by_rollout[0][1:2])


def test_a_teacher_of_ones_own_gives_capabilities_and_score_and_has_the_rest() -> None:
    teacher, rollouts = Flat(), some_rollouts(VOCAB)
    assert teacher.parts(rollouts) == [([0, 1, 2, 3, 4], teacher)] and teacher.teachers == {"default": teacher}
    assert (teacher.context, teacher.noise, teacher.forward, teacher.elsewhere) == (None, 0.0, None, False)
    assert teacher.more_passes(3) == 0
    with teacher.whole():
        teacher.close()
    with pytest.raises(EvidenceError, match=r"TOPK was asked of teacher default, which gives Needs.SAMPLED\. Use"):
        teacher.score(ScoreRequest(rollouts, Needs.TOPK, top_k=4))
    with pytest.raises(NotImplementedError, match="Teacher scores nothing: a teacher defines `score`"):
        Teacher().score(ScoreRequest(rollouts))


def test_several_teachers_are_made_ready_and_closed_one_by_one() -> None:
    said: list[str] = []

    class Telling(Flat):
        def prepare(self, tokenizer, vocab_size, device) -> None:
            said.append(f"prepare {self.name} {vocab_size}")

        def close(self) -> None:
            said.append(f"close {self.name}")

    each = {name: Telling() for name in ("math", "code")}
    for name, teacher in each.items():
        teacher.name = name
    routed = Routed(each)
    tokenizer = None
    routed.prepare(tokenizer, VOCAB, torch.device("cpu"))  # type: ignore[arg-type]
    routed.close()
    assert said[:2] == [f"prepare math {VOCAB}", f"prepare code {VOCAB}"]
    assert sorted(said[2:]) == ["close code", "close math"]


def test_teachers_elsewhere_and_in_this_process_answer_one_request_together() -> None:
    away, here = Flat(), LocalTeacher(tiny_model(sharp=4.0), name="here")
    away.elsewhere, away.name = True, "away"
    rollouts = [
        replace(r, prompt=replace(r.prompt, teacher=name))
        for r, name in zip(some_rollouts(VOCAB), ("here", "away", "here", "away", "away"), strict=True)
    ]
    routed = Routed({"here": here, "away": away})
    assert not routed.elsewhere and Routed({"away": away}).elsewhere
    scores = routed.score(ScoreRequest(rollouts))
    for rollout, score in zip(rollouts, scores, strict=True):
        teacher = here if rollout.prompt.teacher == "here" else away
        torch.testing.assert_close(score.logprobs_T, teacher.score(ScoreRequest([rollout]))[0].logprobs_T)
