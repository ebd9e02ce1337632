"""A solution stands in a column, in front of some questions of the lessons, and is right where the student is not."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from tests.testbeds.test_pair import hurried
from tropd.briefings.briefing import WithColumn
from tropd.cli.main import main
from tropd.config.models import StudentConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig, RunEvalConfig
from tropd.data.graders import resolve_grader
from tropd.testbeds import make_pair
from tropd.testbeds.chain import ChainStyle
from tropd.testbeds.task import Problem
from tropd.testbeds.tokenizer import make_tokenizer
from tropd.testbeds.told import Told

GRADER = resolve_grader("chain")


def scores(task: Told, problems: list[Problem]) -> list[Any]:
    rng = random.Random(1)
    texts = ["".join(word for word, _ in task.write(rng, problem, ChainStyle())) for problem in problems]
    return list(GRADER([""] * len(texts), texts, answer=["".join(problem.answer) for problem in problems]))


def test_solutions_and_told_answers_are_right_and_some_others_are_always_wrong() -> None:
    rng = random.Random(0)
    told, plain = Told(share=1.0, wrong=0.3), Told(wrong=0.3)
    with_it = [told.problem(rng) for _ in range(100)]
    without = [plain.problem(rng) for _ in range(100)]
    assert all("".join(p.question).startswith(p.columns["solution"] + ">") for p in with_it)
    assert all(p.columns["solution"].endswith("".join(p.answer)) for p in (*with_it, *without))
    assert scores(told, with_it) == [1.0] * 100
    assert 10 < sum(scores(plain, without)) < 60
    assert scores(plain, without) == scores(plain, without)
    assert scores(Told(), without) == [1.0] * 100


def test_questions_behind_a_solution_survive_the_tokenizer_and_fit_the_model(tmp_path: Path) -> None:
    rng, task, tokenizer = random.Random(2), Told(share=1.0), make_tokenizer(Told())
    for _ in range(50):
        text = "".join(task.problem(rng).question)
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text and tokenizer.unk_token_id not in ids
    pair = make_pair(hurried("told"), 0, tmp_path / "pair")
    assert json.loads((pair.student / "config.json").read_text())["max_position_embeddings"] == 128


def test_the_student_can_be_told_the_column_of_its_pair(tmp_path: Path) -> None:
    pair = make_pair(hurried("told"), 0, tmp_path / "pair")
    briefing = WithColumn(column="solution", template="{value}>{prompt}")
    run = Run(
        student=StudentConfig(path=str(pair.student)),
        teacher=TeacherConfig(path="start", briefing=briefing),
        data=DataConfig(path=str(pair.prompts)),
        evaluation=RunEvalConfig(data=DataConfig(path=str(pair.held_out)), max_new_tokens=pair.max_new_tokens),
        method="opsd",
        grader=pair.grader,
        device="cpu",
    )
    (tmp_path / "run.toml").write_text(run.dump())
    assert main(["evaluate", str(tmp_path / "run.toml"), "--briefed", "-o", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "summary.json").read_text())["results"]
    assert results["num_prompts"] == results["briefed/num_prompts"] == 20 and results["left_out"] == 0
