"""What is wrong with an object that a run is given is told in one sentence, and what is the user's stays so."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tropd
from tests.own_package.gentle.grader import holds
from tests.run.test_objects import pair_of, settings
from tropd import FullFKL, Teacher
from tropd.errors import TropdError
from tropd.monitoring.display import Silent
from tropd.objective.evidence import Needs
from tropd.teachers.teacher import ScoreRequest
from tropd.types import TeacherScores

Scores = list[TeacherScores]


class Flat(Teacher):
    """Every token is as likely as the next."""

    def __init__(self, change: Callable[[Scores], Any] = lambda scores: scores) -> None:
        self.change, self.closed = change, 0

    def score(self, request: ScoreRequest) -> Scores:
        lengths = [len(rollout.response_ids) for rollout in request.rollouts]
        return self.change([TeacherScores(logprobs_T=torch.full((length,), -1.5)) for length in lengths])

    def close(self) -> None:
        self.closed += 1


class Silenced(Teacher):
    pass


class Worded(Flat):
    capabilities = "sampled"  # type: ignore[assignment]


class Endless(Flat):
    context = "long"  # type: ignore[assignment]


class Boastful(Flat):
    capabilities = Needs.SAMPLED | Needs.TOPK


def each(change: Callable[[torch.Tensor], Any]) -> Callable[[Scores], Scores]:
    return lambda scores: [TeacherScores(logprobs_T=change(s.logprobs_T)) for s in scores]


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        (Flat, r"the class Flat was given. Give an object of it: Flat\(...\)"),
        (Silenced(), r"teacher Silenced scores nothing. Define score\(self, request\)"),
        (Worded(), "teacher Worded: capabilities is 'sampled'. Make it of Needs"),
        (Endless(), "teacher Endless: context is 'long'. Give a number of tokens"),
        (Flat(lambda scores: None), "the teacher returned a NoneType. Return a list of TeacherScores"),
        (Flat(iter), "the teacher returned a list_iterator. Return a list"),
        (Flat(lambda scores: [s.logprobs_T for s in scores]), "a Tensor for a rollout. Return a TeacherScores"),
        (Flat(each(lambda x_T: None)), "gives logprobs_T as NoneType, and a tensor is asked for"),
        (Flat(each(lambda x_T: x_T.tolist())), "gives logprobs_T as list, and a tensor is asked for"),
        (Flat(each(lambda x_T: x_T[None])), r"shape \(1, \d+\) of torch.float32, and 1 axes of floating-point numbers"),
        (Flat(each(torch.Tensor.long)), r"of torch.int64, and 1 axes of floating-point numbers are asked for"),
        (Flat(each(lambda x_T: x_T[1:])), r"has \d+ response tokens, but teacher 'default' scored \d+"),
        (Flat(each(lambda x_T: -x_T)), "a log-probability is never above 0"),
        (Flat(each(lambda x_T: x_T * torch.nan)), "holds NaN"),
    ],
)
def test_a_teacher_that_keeps_no_promise_is_told_which(models: Path, tmp_path: Path, teacher: Any, says: str) -> None:
    with pytest.raises(TropdError, match=says):
        tropd.train(settings(models, tmp_path / "run", method=tropd.OPD()), teacher=teacher, display=Silent())


def test_evidence_that_a_teacher_promised_and_does_not_give_is_missed(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path / "run", method=FullFKL(top_k=4))
    with pytest.raises(TropdError, match="gives topk_ids_TK as NoneType, and a tensor is asked for"):
        tropd.train(run, teacher=Boastful(), display=Silent())


def test_a_teacher_that_was_given_is_not_closed(models: Path, tmp_path: Path) -> None:
    teacher = Flat()
    run = replace(settings(models, tmp_path / "run", method=tropd.OPD()), steps=1)
    tropd.train(run, teacher=teacher, display=Silent())
    tropd.resume(tmp_path / "run", teacher=teacher, steps=2, display=Silent())
    assert teacher.closed == 0


def test_models_that_cannot_be_trained_as_they_are_say_so(models: Path, tmp_path: Path) -> None:
    student, nowhere, frozen = (pair_of(models / "student") for _ in range(3))
    nowhere[0].to("meta")
    next(frozen[0].parameters()).requires_grad_(False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"student": student, "teacher": student}, r"student and teacher are one model.*copy.deepcopy\(model\)"),
        ({"student": nowhere}, "student: weights of the model are on the device 'meta'"),
        ({"teacher": nowhere}, "teacher: weights of the model are on the device 'meta'"),
        ({"student": frozen}, r"student: 1 of the model's tensors are frozen.*model.requires_grad_\(True\)"),
    ]
    for objects, says in cases:
        with pytest.raises(TropdError, match=says):
            tropd.train(settings(models, tmp_path / "run"), display=Silent(), **objects)
    assert all(weight.requires_grad for weight in student[0].parameters())


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{1: "a"}], "a column is called 1. Give text as the key of each"),
        ([{"prompt": "a"}, {"prompt": "\ud800"}], "row 2 holds a lone surrogate"),
    ],
)
def test_rows_that_no_file_could_hold_are_told(models: Path, tmp_path: Path, rows: Any, says: str) -> None:
    with pytest.raises(TropdError, match=says):
        tropd.train(settings(models, tmp_path / "run"), prompts=rows, display=Silent())


@pytest.mark.parametrize(
    ("callbacks", "says"),
    [
        ([tropd.Callback], "the class Callback was given"),
        ([print], "a builtin_function"),
        (None, "a NoneType was given"),
    ],
)
def test_what_is_no_callback_is_refused_before_the_start(
    models: Path, tmp_path: Path, callbacks: Any, says: str
) -> None:
    with pytest.raises(TropdError, match=f"callbacks: {says}.*objects of tropd.Callback"):
        tropd.train(settings(models, tmp_path / "run"), callbacks=callbacks, display=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"student": 3}, r"student is a int. Give a StudentConfig. Objects are for train\(run, student=...\)"),
        ({"teacher": (1, 2)}, r"teacher is a tuple. Give a TeacherConfig. Objects are for train\(run, teacher=...\)"),
        ({"data": [{"prompt": "a"}]}, r"data is a list. Give a DataConfig. Objects are for train\(run, prompts=...\)"),
        ({"grader": len}, r"grader is a builtin_function_or_method.*train\(run, grader=...\)"),
        ({"method": tropd.OPD}, r"method is the class OPD. Give a method, such as OPD\(\), or its name"),
        ({"method": lambda: 3}, "method is a function. Give a method"),
        ({"rollout": {"num_prompts": 2}}, "rollout is a dict. Give a RolloutConfig"),
        ({"teachers": {"a": 3}}, "teachers.a is a int. Give a TeacherConfig"),
        ({"teachers": ["a"]}, "teachers is a list. Give a dict"),
        ({"output": None}, "output is a NoneType. Give a str"),
    ],
)
def test_a_part_of_a_run_of_another_kind_is_named(parts: dict[str, Any], says: str) -> None:
    with pytest.raises(TropdError, match=says):
        tropd.Run(**parts)


def test_a_run_takes_its_folder_as_a_path_and_its_student_by_where_the_object_came_from(
    models: Path, tmp_path: Path
) -> None:
    run = replace(settings(models, tmp_path / "run", method=tropd.OPD()), steps=1, output=tmp_path / "run")
    run = replace(run, student=tropd.StudentConfig(path=str(tmp_path / "elsewhere")))
    tropd.train(run, student=pair_of(models / "student"), display=Silent())
    assert tropd.Run.load(tmp_path / "run" / "run.toml").student.path == str(models / "student")


def test_what_is_no_run_and_what_are_no_settings_is_refused(models: Path) -> None:
    with pytest.raises(TropdError, match=r"a str was given to train. Give a Run: Run\(...\), or Run.load"):
        tropd.train("run.toml")  # type: ignore[arg-type]
    with pytest.raises(TropdError, match="settings: a dict was given. Give an EvalConfig"):
        tropd.evaluate(models / "student", [{"prompt": "a"}], settings={"limit": 3})  # type: ignore[arg-type]


def test_a_name_does_not_stand_for_an_object_on_resume(models: Path, tmp_path: Path) -> None:
    def judge(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence[Any]) -> list[float]:
        return [0.0 for _ in completions]

    run = replace(settings(models, tmp_path / "run", method=tropd.OPD()), steps=1)
    tropd.train(run, grader=judge, display=Silent())
    with pytest.raises(TropdError, match="was given its grader as an object in Python. Give such an object again"):
        tropd.resume(tmp_path / "run", grader="exact", steps=2, display=Silent())  # type: ignore[arg-type]
    tropd.resume(tmp_path / "run", grader=holds, steps=2, display=Silent())  # has a name, and is taken as it is
