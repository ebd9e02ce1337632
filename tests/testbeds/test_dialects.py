"""Texts in dialects are long, right where they say so, and of a large vocabulary; kin words begin alike."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from tests.testbeds.test_pair import hurried
from tropd.data.graders import resolve_grader
from tropd.testbeds import TESTBEDS, make_pair
from tropd.testbeds.dialects import Dialects, DialectStyle
from tropd.testbeds.task import Lesson, Problem, Shape
from tropd.testbeds.tokenizer import vocabulary_of
from tropd.testbeds.training import make_model

TASK = Dialects()
PROBLEM = Problem(question=("d3", "d5", "d+", "d+2", "d(2)", "d?"), answer=("#", "2"), givens=("d", 3, 5, "+", 2, 2))


def written(style: DialectStyle, problem: Problem = PROBLEM, seed: int = 0) -> str:
    return " ".join(word for word, _ in TASK.write(random.Random(seed), problem, style))


def test_each_number_is_made_of_the_two_before() -> None:
    assert written(DialectStyle(bar=0.0)) == (
        "d(2) d: d5 d+ d3 d= d1 d+2 d= d3 d; d(1) d: d3 d+ d5 d= d1 d+2 d= d3 d; # 3"
    )
    assert written(DialectStyle(terse=True, bar=1.0)) == "d(2) d3 d| d(1) d3 d| # 3"


@pytest.mark.parametrize("style", [DialectStyle(), DialectStyle(terse=True), DialectStyle(foreign=1.0, mixed=0.5)])
def test_every_text_without_noise_is_right(style: DialectStyle) -> None:
    rng, grader = random.Random(1), resolve_grader("chain")
    problems = [TASK.problem(rng) for _ in range(30)]
    texts = [written(style, problem, seed) for seed, problem in enumerate(problems)]
    answers = [" ".join(problem.answer) for problem in problems]
    assert grader([""] * 30, texts, answer=answers) == [1.0] * 30
    wrong = [written(dataclasses.replace(style, noise=1.0), problem) for problem in problems]
    assert sum(grader([""] * 30, wrong, answer=answers)) < 15


def test_answers_are_long_and_words_many() -> None:
    rng = random.Random(2)
    lengths = [len(TASK.write(rng, TASK.problem(rng), DialectStyle())) for _ in range(50)]
    assert min(lengths) > 200 and max(lengths) < TESTBEDS["long"].max_new_tokens
    assert len(set(TASK.words)) == len(TASK.words) > 1000


def test_a_foreign_text_is_in_one_other_dialect_and_a_mixed_one_in_many() -> None:
    problem = TASK.problem(random.Random(3))
    styles = (DialectStyle(foreign=1.0), DialectStyle(mixed=1.0))
    spoken = [{word[0] for word in written(style, problem).split()[:-2]} for style in styles]
    assert len(spoken[0]) == 1 and spoken[0] != {problem.givens[0]}
    assert len(spoken[1]) > 10


def test_words_of_one_dialect_or_one_meaning_begin_alike() -> None:
    model, ids = make_model(TASK, Shape(), 64, seed=0), vocabulary_of(TASK)
    for rows in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        a3, a4, b3, b4 = (rows[ids[word]].detach() for word in ("a3", "a4", "b3", "b4"))
        torch.testing.assert_close(a3 - b3, a4 - b4, atol=1e-6, rtol=0.0)
        assert (a3 - b4).norm() > (a3 - b3).norm() > 1.0


def test_lessons_get_harder_and_a_pair_is_made_of_them(tmp_path: Path) -> None:
    bed = TESTBEDS["long"]
    assert bed.student is not None and bed.student.width < bed.teacher.width
    lessons = [each.task.steps for each in bed.teacher_training if isinstance(each, Lesson)]
    assert lessons == sorted(lessons) and not isinstance(bed.teacher_training[-1], Lesson)
    pair = make_pair(hurried("long", max_new_tokens=8, num_train=8, num_held_out=8), 0, tmp_path / "pair")
    assert pair.grader == "chain" and len(pair.prompts.read_text().splitlines()) == 8
