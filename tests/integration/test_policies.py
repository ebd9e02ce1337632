"""Who writes which token: every option of every rollout policy, with engines that write what they are told."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.one_step import parts_of, step_of
from tests.small_runs import TROPD, write_models
from tropd.errors import ConfigError
from tropd.methods.drafts import RolloutJob
from tropd.methods.policies import Mixture, OnPolicy, RolloutPolicy, TeacherPrefix, TeacherText
from tropd.objective.schedules import Schedule
from tropd.rollout.scripted import ScriptedEngine
from tropd.rollout.stage import roll_out
from tropd.types import Author, Finish, Prompt, Request, Rollout, Sampling

STOP, BUDGET = 99, 10
LONG = Schedule(shape="constant", start=0.8)


def prompts_of(number: int = 3, **fields: tuple[int, ...]) -> list[tuple[Prompt, int]]:
    return [(Prompt(id=f"p/{n}", token_ids=(n, n + 1), **fields), 0) for n in range(number)]


def teacher_of(length: int = 30) -> ScriptedEngine:
    """Writes 100 to 149 and ends after `length` tokens; the first tells the request's seed."""
    return ScriptedEngine(lambda request: [100 + (request.seed + t) % 50 for t in range(length - 1)], logprob=-1.0)


def student_of(length: int = 30) -> ScriptedEngine:
    """Writes 200 to 249; the first tells what stands before it."""
    return ScriptedEngine(lambda r: [200 + (sum(r.token_ids) + t) % 50 for t in range(length - 1)], logprob=-2.0)


def job_of(prompts: Sequence[tuple[Prompt, int]], num_rollouts: int = 2, progress: float = 0.0) -> RolloutJob:
    return RolloutJob(
        prompts=prompts,
        num_rollouts=num_rollouts,
        max_new_tokens=BUDGET,
        sampling=Sampling(),
        stop_ids=(STOP,),
        seed=3,
        progress=progress,
        teacher_sampling=Sampling(temperature=0.5),
    )


def written_by(rollout: Rollout, author: Author) -> tuple[int, ...]:
    return tuple(i for i, a in zip(rollout.token_ids, rollout.authors, strict=True) if a == author)


def prefix_lengths(rollouts: Sequence[Rollout]) -> list[int]:
    return [len(written_by(r, Author.TEACHER)) for r in rollouts]


def check(rollouts: Sequence[Rollout], job: RolloutJob, student: ScriptedEngine, texts: Sequence[Request]) -> None:
    """What holds for any policy: the student goes on from exactly what stands there, and nothing is too long."""
    names = [f"{visit}/{p.id}/{i}" for p, visit in job.prompts for i in range(job.num_rollouts)]
    assert [r.id for r in rollouts] == names
    asked = {request.token_ids: request for request in student.requests}
    for r in rollouts:
        num_prompt, given, own = len(r.prompt.token_ids), written_by(r, Author.TEACHER), written_by(r, Author.STUDENT)
        assert r.token_ids == r.prompt.token_ids + given + own
        assert r.authors == tuple(sorted(r.authors, key=[Author.CONTEXT, Author.TEACHER, Author.STUDENT].index))
        assert 1 <= len(r.response_ids) <= BUDGET and len(r.authors) == len(r.token_ids)
        assert r.response_ids.count(STOP) == (r.finish == Finish.STOP) and STOP not in r.response_ids[:-1]
        assert r.behavior_logprobs == (0.0,) * (num_prompt + len(given)) + (-2.0,) * len(own)
        if own:
            request = asked[r.prompt.token_ids + given]
            assert request.max_new_tokens == BUDGET - len(given) and request.stop_ids == (STOP,)
            assert own == (*student.answers(request), STOP)[: request.max_new_tokens]
    assert all(request.sampling == job.teacher_sampling for request in texts)
    assert len({request.seed for request in student.requests}) == len(student.requests)


OPTIONS = list(itertools.product(("longest", "uniform"), ("shared", "own"), (0, 1, 4), (0.5, 1.0), (0.4, 1.0)))


@pytest.mark.parametrize("length", [1, 2, 5, 10, 30])
def test_every_option_of_prefixes_leaves_whole_rollouts(length: int) -> None:
    for draw, texts, keep, share, start in OPTIONS:
        schedule = Schedule(shape="constant", start=start)
        policy = TeacherPrefix(length=schedule, draw=draw, texts=texts, keep=keep, share=share)  # type: ignore[arg-type]
        student, teacher, job = student_of(4), teacher_of(length), job_of(prompts_of(6))
        rollouts = roll_out(policy, job, student, teacher)
        check(rollouts, job, student, teacher.requests)
        for r in rollouts:
            given = written_by(r, Author.TEACHER)
            if given:
                start_of_text = (given[0] - 100) % 50
                assert (
                    given[: length - 1]
                    == tuple(100 + (start_of_text + t) % 50 for t in range(len(given)))[: length - 1]
                )
            if written_by(r, Author.STUDENT):
                assert len(given) <= max(min(length, BUDGET) - keep, 0) and len(given) <= int(start * BUDGET)
            else:
                assert keep == 0 and len(given) == length and r.finish == Finish.STOP


SHAPES = [
    ("constant", {0.0: 10, 0.5: 10, 1.0: 10}),
    ("linear", {0.0: 10, 0.25: 7, 0.5: 5, 0.95: 0, 1.0: 0}),
    ("cosine", {0.0: 10, 1 / 3: 7, 0.5: 5, 0.9: 0, 1.0: 0}),
    ("convex", {0.0: 10, 0.25: 6, 0.5: 2, 0.9: 0, 1.0: 0}),
    ("switch", {0.0: 10, 0.99: 10, 1.0: 0}),
]


@pytest.mark.parametrize(("shape", "expected"), SHAPES)
def test_prefixes_shrink_along_the_curve_and_leave_the_student_a_token(shape, expected: dict[float, int]) -> None:
    policy = TeacherPrefix(length=Schedule(shape=shape))
    for progress, longest in expected.items():
        teacher = teacher_of()
        rollouts = roll_out(policy, job_of(prompts_of(), progress=progress), student_of(), teacher)
        assert set(prefix_lengths(rollouts)) == {min(longest, BUDGET - 1)}, progress
        assert bool(teacher.requests) == (longest > 0)


def test_a_curve_can_end_early_and_above_nothing() -> None:
    policy = TeacherPrefix(length=Schedule(shape="linear", start=0.9, end=0.2, until=0.5))
    for progress, length in {0.0: 9, 0.25: 5, 0.5: 2, 1.0: 2}.items():
        rollouts = roll_out(policy, job_of(prompts_of(), progress=progress), student_of(), teacher_of())
        assert set(prefix_lengths(rollouts)) == {length}


def test_uniform_prefixes_take_every_length_about_equally_often() -> None:
    policy = TeacherPrefix(length=LONG, draw="uniform")
    rollouts = roll_out(policy, job_of(prompts_of(450)), student_of(), teacher_of())
    lengths = Counter(prefix_lengths(rollouts))
    assert set(lengths) == set(range(9))
    assert all(60 < number < 140 for number in lengths.values())  # 100 each, four standard deviations


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_share_of_rollouts_gets_a_prefix(share: float) -> None:
    teacher = teacher_of()
    rollouts = roll_out(TeacherPrefix(length=LONG, share=share), job_of(prompts_of(500)), student_of(), teacher)
    got = sum(length == 8 for length in prefix_lengths(rollouts)) / len(rollouts)
    assert abs(got - share) < 0.06 and set(prefix_lengths(rollouts)) <= {0, 8}
    assert (len(teacher.requests) == 0) == (share == 0)


def test_shared_texts_are_written_once_for_a_prompt_and_own_ones_once_for_a_rollout() -> None:
    for texts, number in (("shared", 3), ("own", 12)):
        teacher = teacher_of()
        policy = TeacherPrefix(length=LONG, texts=texts)
        rollouts = roll_out(policy, job_of(prompts_of(), num_rollouts=4), student_of(), teacher)
        assert len(teacher.requests) == number
        for name in {r.group for r in rollouts}:
            prefixes = {written_by(r, Author.TEACHER) for r in rollouts if r.group == name}
            assert (len(prefixes) == 1) == (texts == "shared")


def test_a_teachers_end_inside_the_prefix_is_left_to_the_student_or_ends_the_rollout() -> None:
    for keep, student_writes, length in ((1, True, 4), (3, True, 2), (7, True, 0), (0, False, 5)):
        student = student_of(3)
        rollouts = roll_out(TeacherPrefix(length=LONG, keep=keep), job_of(prompts_of()), student, teacher_of(5))
        assert set(prefix_lengths(rollouts)) == {length}
        assert all(bool(written_by(r, Author.STUDENT)) == student_writes for r in rollouts)
        assert (len(student.requests) == 6) == student_writes
        assert all((r.token_ids[-1], r.finish) == (STOP, Finish.STOP) for r in rollouts)


def test_a_text_that_never_ends_leaves_the_student_a_token_even_when_none_is_kept() -> None:
    policy = TeacherPrefix(length=Schedule(start=1.0), keep=0)
    rollouts = roll_out(policy, job_of(prompts_of()), student_of(), teacher_of())
    assert set(prefix_lengths(rollouts)) == {BUDGET - 1}
    assert all(r.finish == Finish.LENGTH for r in rollouts)


@pytest.mark.parametrize("coin", ["batch", "rollout"])
def test_a_mixture_is_the_students_with_its_share(coin) -> None:
    policy, num_own = Mixture(student_share=0.3, coin=coin), 0
    for visit in range(400):
        job = job_of([(p, visit) for p, _ in prompts_of()])
        rollouts = roll_out(policy, job, student_of(), teacher_of())
        own = [bool(written_by(r, Author.STUDENT)) for r in rollouts]
        assert all(a != bool(length) for a, length in zip(own, prefix_lengths(rollouts), strict=True))
        assert coin == "rollout" or len(set(own)) == 1
        num_own += sum(own)
    assert abs(num_own / 2400 - 0.3) < (0.1 if coin == "batch" else 0.04)


def test_the_ends_of_a_mixture_ask_one_side_only() -> None:
    for share in (0.0, 1.0):
        student, teacher = student_of(), teacher_of()
        rollouts = roll_out(Mixture(student_share=share), job_of(prompts_of()), student, teacher)
        assert (len(student.requests), len(teacher.requests)) == ((6, 0) if share == 1 else (0, 6))
        check(rollouts, job_of(prompts_of()), student, teacher.requests)


POLICIES: list[RolloutPolicy] = [
    OnPolicy(),
    TeacherText(),
    Mixture(student_share=0.5, coin="rollout"),
    TeacherPrefix(length=LONG, draw="uniform", share=0.7, texts="own"),
    TeacherPrefix(length=LONG, draw="uniform", texts="shared", keep=2),
]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_rollout_depends_on_its_name_and_not_on_its_neighbours(policy: RolloutPolicy) -> None:
    def by_id(prompts: list[tuple[Prompt, int]], num_rollouts: int) -> dict[str, Rollout]:
        written = roll_out(policy, job_of(prompts, num_rollouts), student_of(7), teacher_of(9))
        return {r.id: r for r in written}

    prompts = prompts_of(5)
    whole = by_id(prompts, 3)
    assert by_id(prompts[::-1], 3) == whole
    assert by_id(prompts[1:3], 3).items() <= whole.items()
    assert by_id(prompts, 2).items() <= whole.items()


def test_another_epoch_draws_anew_from_the_same_teachers_texts() -> None:
    policy = TeacherPrefix(length=LONG, draw="uniform")
    (prompt, _), student, teacher = prompts_of(1)[0], student_of(), teacher_of()
    roll_out(policy, job_of([(prompt, 0), (prompt, 1)]), student, teacher)
    assert len({request.seed for request in teacher.requests}) == 1
    assert len({request.seed for request in student.requests}) == 4


def test_responses_of_the_data_set_stand_in_for_the_teacher_who_is_not_asked() -> None:
    text = (50, 51, 52, STOP)
    for policy, given in (
        (TeacherText(), text),
        (TeacherPrefix(length=LONG), text[:3]),
        (Mixture(student_share=0), text),
    ):
        rollouts = roll_out(policy, job_of(prompts_of(response_ids=text)), student_of(), None)
        assert {written_by(r, Author.TEACHER) for r in rollouts} == {given}
    mixed = [prompts_of(1)[0], (dataclasses.replace(prompts_of(2)[1][0], response_ids=text), 0)]
    teacher = teacher_of()
    rollouts = roll_out(TeacherText(), job_of(mixed), student_of(), teacher)
    assert {request.token_ids for request in teacher.requests} == {mixed[0][0].token_ids}
    assert [r.response_ids == text for r in rollouts] == [False, False, True, True]


def test_a_response_of_the_data_set_ends_where_an_engine_would_have_ended() -> None:
    for text, kept, finish in (
        ((50,) * 12, (50,) * BUDGET, Finish.LENGTH),
        ((50, STOP, 51, STOP), (50, STOP), Finish.STOP),
        ((50,) * 9 + (STOP,), (50,) * 9 + (STOP,), Finish.STOP),
    ):
        (rollout,) = roll_out(TeacherText(), job_of(prompts_of(1, response_ids=text), 1), student_of(), None)
        assert (rollout.response_ids, rollout.finish) == (kept, finish)
        student = student_of(2)
        policy = TeacherPrefix(length=Schedule(start=1.0))
        (rollout,) = roll_out(policy, job_of(prompts_of(1, response_ids=text), 1), student, None)
        assert STOP not in written_by(rollout, Author.TEACHER) and len(student.requests) == 1


def test_texts_that_nobody_can_write_are_refused_with_the_way_out() -> None:
    for policy in (TeacherText(), TeacherPrefix(), Mixture(student_share=0.0)):
        with pytest.raises(ConfigError, match=r"cannot write and .* of .* bring no response.*no-guidance"):
            roll_out(policy, job_of(prompts_of()), student_of(), None)


@pytest.mark.parametrize("denominator", ["actions", "student"])
def test_prefix_tokens_count_in_the_denominator_or_not(tmp_path: Path, denominator: str) -> None:
    step = step_of(parts_of(write_models(tmp_path), TROPD | {"denominator": denominator}))
    authors = [a for r in step.rollouts for a in r.authors]
    num_student, num_teacher = authors.count(Author.STUDENT), authors.count(Author.TEACHER)
    assert num_teacher > 0
    number = num_student + num_teacher if denominator == "actions" else num_student
    total = {term: sum(float(w.sum()) for w in weights.values()) for term, weights in step.shares.items()}
    assert total["trusted"] + total["outlier"] == pytest.approx(num_student / number)
    assert total["guidance"] == pytest.approx(0.1 * num_teacher / number)
