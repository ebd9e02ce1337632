"""reasoning-gym's questions, answers and verifiers, through a tiny pair and a run."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("reasoning_gym", reason="the extra 'gym' is not installed: pip install 'tropd[gym]'")

from tests.testbeds.test_pair import first_step, hurried
from tropd.data.graders import resolve_grader
from tropd.errors import DataError
from tropd.testbeds import make_pair
from tropd.testbeds.gym import Gym, GymStyle
from tropd.testbeds.task import Problem
from tropd.testbeds.tokenizer import make_tokenizer

TASK = Gym()
GRADER = resolve_grader("gym")
SUM = {"question": "4 - 1 - 7", "answer": "-4", "metadata": {"source_dataset": "chain_sum", "expression": "4 - 1 - 7"}}
WORD = {"question": "leally", "answer": "yllael", "metadata": {"source_dataset": "spell_backward", "word": "leally"}}


def written(entry: dict, style: GymStyle) -> str:
    problem = Problem(question=(), answer=(), givens=entry)
    return "".join(word for word, _ in TASK.write(random.Random(0), problem, style))


def test_texts_show_their_work_or_only_the_answer() -> None:
    assert written(SUM, GymStyle()) == "4-1=3;3-7=-4;<answer>-4</answer>"
    assert written(WORD, GymStyle()) == "leally>yllael;<answer>yllael</answer>"
    assert written(SUM, GymStyle(terse=True)) == "<answer>-4</answer>"


@pytest.mark.parametrize("terse", [False, True])
def test_the_packages_verifier_accepts_every_text_without_noise(terse: bool) -> None:
    rng = random.Random(1)
    problems = [TASK.problem(rng) for _ in range(60)]
    entries = [problem.columns["entry"] for problem in problems]
    right = ["".join(w for w, _ in TASK.write(rng, problem, GymStyle(terse=terse))) for problem in problems]
    wrong = ["".join(w for w, _ in TASK.write(rng, problem, GymStyle(terse=terse, noise=1.0))) for problem in problems]
    assert GRADER([""] * 60, right, entry=entries) == [1.0] * 60
    assert sum(GRADER([""] * 60, wrong, entry=entries)) < 30
    assert {json.loads(entry)["metadata"]["source_dataset"] for entry in entries} == {"chain_sum", "spell_backward"}


def test_the_grader_reads_bare_answers_and_messages_and_refuses_what_is_no_entry() -> None:
    said = ["-4", "so <answer>-4.0</answer>", "<answer>4</answer>", [{"role": "assistant", "content": "-4"}]]
    scores = GRADER([""] * 4, said, entry=[SUM] * 4)
    assert scores[:2] == [1.0, 1.0] and scores[2] < 0.1 and scores[3] == 1.0
    with pytest.raises(DataError, match="needs the column 'entry'"):
        GRADER([""], ["4"])
    with pytest.raises(DataError, match="cannot read the entry"):
        GRADER([""], ["4"], entry=["no JSON"])
    with pytest.raises(DataError, match="has no task 'no_such'"):
        GRADER([""], ["4"], entry=[{"answer": "4", "metadata": {"source_dataset": "no_such"}}])


def test_questions_and_texts_survive_the_tokenizer() -> None:
    rng, tokenizer = random.Random(2), make_tokenizer(TASK)
    for _ in range(50):
        problem = TASK.problem(rng)
        text = "".join((*problem.question, *(word for word, _ in TASK.write(rng, problem, GymStyle()))))
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text and tokenizer.unk_token_id not in ids


def test_a_run_reads_the_pair(tmp_path: Path) -> None:
    pair = make_pair(hurried("gym"), 0, tmp_path / "pair")
    record = first_step(pair, tmp_path / "run")
    assert record.gradient_norm > 0 and record.evaluation is not None
