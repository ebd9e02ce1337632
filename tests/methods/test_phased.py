"""Texts of the teacher among the student's rollouts, where the grader finds them right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tropd.errors import ConfigError
from tropd.methods import OPD, TrOPD
from tropd.methods.drafts import RolloutJob
from tropd.methods.guidance import Guidance
from tropd.methods.phased import Phased
from tropd.objective.losses import NegativeLogLikelihood
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import TEACHER
from tropd.objective.terms import Term
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.stage import roll_out
from tropd.types import Author, Finish, Prompt, Rollout, Sampling

HALF = Schedule(start=0.5)


def even(rollouts: Sequence[Rollout]) -> list[Rollout]:
    """Right are texts that begin with an even token and have six tokens before they end."""
    return [replace(r, reward=float(r.response_ids[0] % 2 == 0 and len(r.response_ids) == 7)) for r in rollouts]


def job_of(progress: float = 0.0, visit: int = 0, **fields: Any) -> RolloutJob:
    prompts = [(Prompt(id=f"p/{n}", token_ids=(n, n + 1)), visit) for n in range(20)]
    job = RolloutJob(
        prompts=prompts,
        num_rollouts=4,
        max_new_tokens=10,
        sampling=Sampling(),
        stop_ids=(99,),
        seed=3,
        progress=progress,
        grade=even,
    )
    return replace(job, **fields)


def teacher() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [100 + request.seed % 50] + [100] * 5)


def student() -> ScriptedEngine:
    return ScriptedEngine(lambda request: [200] * 30)


def written_by_teacher(rollouts: Sequence[Rollout]) -> list[Rollout]:
    return [r for r in rollouts if Author.TEACHER in r.authors]


def test_what_passes_is_the_teachers_and_what_fails_stays_the_students() -> None:
    writer = teacher()
    rollouts = roll_out(Phased(share=HALF), job_of(), student(), writer)
    theirs = written_by_teacher(rollouts)
    assert len(writer.requests) == 40 and 10 < len(theirs) < 30
    assert all(r.response_ids[0] % 2 == 0 and r.finish == Finish.STOP for r in theirs)
    assert all(set(r.authors[2:]) == {Author.TEACHER} for r in theirs)
    assert {r.id[-1] for r in theirs} == {"0", "1"}, "the first of each group, so that a kept text is found again"
    unchecked = roll_out(Phased(share=HALF, verified=False), job_of(grade=None), student(), teacher())
    assert len(written_by_teacher(unchecked)) == 40
    none = roll_out(Phased(share=HALF, passes=1.5), job_of(), student(), teacher())
    assert none == roll_out(Phased(share=Schedule(start=0.0)), job_of(), student(), None)


def test_the_share_fades_and_texts_are_those_of_every_visit() -> None:
    policy = Phased(share=Schedule(shape="linear", start=1.0, end=0.0, until=0.5), verified=False)
    numbers, seeds = [], []
    for visit, progress in enumerate((0.0, 0.2, 0.4, 0.5, 1.0)):
        writer = teacher()
        numbers.append(len(written_by_teacher(roll_out(policy, job_of(progress, visit), student(), writer))))
        seeds.append({request.seed for request in writer.requests})
    assert numbers[0] == 80 and 38 <= numbers[1] <= 58 and 8 <= numbers[2] <= 24 and numbers[3:] == [0, 0]
    assert seeds[2] < seeds[1] < seeds[0]


def test_a_grader_reads_whole_texts_and_a_horizon_cuts_them_after_that() -> None:
    policy, short = Phased(share=HALF), job_of(max_new_tokens=3, budget=10)
    theirs = written_by_teacher(roll_out(policy, short, student(), teacher()))
    assert len(theirs) == len(written_by_teacher(roll_out(policy, job_of(), student(), teacher())))
    assert all(len(r.response_ids) == 3 and r.finish == Finish.HORIZON for r in theirs)


def test_a_text_of_the_data_set_is_taken_instead() -> None:
    prompts = [(Prompt(id=f"p/{n}", token_ids=(n,), response_ids=(10 + n, 1, 1, 1, 1, 1, 99)), 0) for n in range(4)]
    theirs = written_by_teacher(roll_out(Phased(share=HALF), job_of(prompts=prompts), student(), None))
    assert {r.response_ids[0] for r in theirs} == {10, 12}


def test_a_share_beyond_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"a share lies in \[0, 1\]"):
        Phased(share=Schedule(start=1.5))


def test_guidance_adds_the_likelihood_of_the_teachers_tokens_to_any_method_but_not_twice() -> None:
    plain, guided = OPD().objective, OPD(plus=(Guidance(beta=0.5),)).objective
    assert guided.terms[:-1] == plain.terms
    assert guided.terms[-1] == Term("guidance", TEACHER, NegativeLogLikelihood(), weight=0.5)
    with pytest.raises(ConfigError, match="the method has it already"):
        _ = TrOPD(plus=(Guidance(),)).objective
