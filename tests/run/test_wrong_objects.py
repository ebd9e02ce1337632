"""What is wrong with an object that a run is given is told in one sentence, and what is the user's stays so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import tropd
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
    for objects, says in (
        ({"student": student, "teacher": student}, r"student and teacher are one model.*copy.deepcopy\(model\)"),
        ({"student": nowhere}, "student: weights of the model are on the device 'meta'"),
        ({"teacher": nowhere}, "teacher: weights of the model are on the device 'meta'"),
        ({"student": frozen}, r"student: 1 of the model's tensors are frozen.*model.requires_grad_\(True\)"),
    ):
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
