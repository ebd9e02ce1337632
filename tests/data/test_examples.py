"""Solved examples for a problem: the nearest or random ones, never the problem itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import write_rows
from tests.told import SHOWN, told, write_world
from tropd.briefings.asked import Asked, Example
from tropd.briefings.briefing import WithDemonstrations, read_briefing
from tropd.data.examples import Shelf
from tropd.data.rows import table_of
from tropd.doctor import examine
from tropd.errors import ConfigError, DataError
from tropd.training.assembly import load_parts
from tropd.types import Message

PROBLEMS = (
    *("the area of a red circle", "the area of a square", "the speed of a train", "a train and a red car"),
    *("the sum of two odd numbers", "圆的面积", "正方形的面积", "the area of a red circle"),
)


def shelf(problems: tuple[str, ...] = PROBLEMS) -> Shelf:
    rows = [{"prompt": problem, "solution": f"s{n}"} for n, problem in enumerate(problems)]
    return Shelf(table_of(rows, "rows"), "prompt", "solution")


def found(question: str, **knobs: Any) -> list[str]:
    asked = (Message(role="user", content=question),)
    return [example.solution for example in shelf().pick(asked, WithDemonstrations(**knobs), None)]


def test_the_nearest_share_the_most_words_and_are_never_the_problem_itself() -> None:
    pytest.importorskip("bm25s", reason="the extra 'retrieval' is not installed: pip install 'tropd[retrieval]'")
    assert found("The area  of a red circle", count=2) == ["s1", "s3"], "equal problems are left out"
    assert found("how fast is the train", count=1) == ["s2"]
    assert found("三角形的面积", count=2) == ["s6", "s5"], "in Chinese each character counts"
    assert found("the area of a square", count=2, draw=0) + found("the area of a square", count=2, draw=1) == found(
        "the area of a square", count=4
    )
    assert len(found("?!", count=3)) == 3, "without a word there is still an answer"


def test_random_examples_depend_on_the_problem_and_the_draw_alone() -> None:
    first = found(PROBLEMS[0], pick="random", count=3)
    assert found(PROBLEMS[0], pick="random", count=3) == first and len(set(first)) == 3
    draws = {tuple(found(PROBLEMS[0], pick="random", count=3, draw=draw)) for draw in range(8)}
    assert len(draws) > 4
    for question in PROBLEMS:
        every = found(question, pick="random", count=99)
        assert sorted(every) == [f"s{n}" for n, problem in enumerate(PROBLEMS) if problem != question]


def test_a_reader_is_told_whether_the_solutions_are_right() -> None:
    examples = (Example(problem="p {x}", solution="s"),)
    asked = Asked(messages=(Message(role="user", content="q"),), examples=examples)
    good, bad = (WithDemonstrations(good=good).messages(asked) for good in (True, False))
    assert good and bad and "is right" in good[-1].content and "is wrong" in bad[-1].content
    assert all("Problem:\np {x}\n\nSolution:\ns" in told[-1].content for told in (good, bad))
    assert WithDemonstrations().messages(Asked(messages=asked.messages)) is None


def test_examples_come_from_the_data_of_the_run_or_from_a_file(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    other = write_rows(tmp_path / "other.jsonl", [{"q": [{"role": "user", "content": "9+9="}], "wrong": 17}])
    wrong = {"source": str(other), "problem": "q", "solution": "wrong", "good": False}
    for briefing in ({**SHOWN, "pick": "random"}, {**SHOWN, "pick": "random", **wrong}):
        parts = load_parts(told(world, briefing), tmp_path)
        for prompt, _ in parts.stream.next(9):
            text = str(parts.tokenizer.decode(list(prompt.told["teacher"])))
            question = prompt.messages[0].content
            shown = text.partition("; ")[0]
            assert text.endswith(f"; {question}<|end|><|assistant|>") and question not in shown
            assert ("9+9=17" in shown) == ("source" in briefing) and (" after " in shown) != ("source" in briefing)


@pytest.mark.parametrize(
    ("briefing", "data", "says"),
    [
        ({"solution": "solutoin"}, {}, r"has none \(did you mean 'solution'\?\).*Set briefing.problem"),
        ({"source": "nowhere.jsonl"}, {}, "nowhere.jsonl"),
        ({}, {"streaming": True}, "Name a file in briefing.source"),
        ({"solution": "empty"}, {}, "so no example can be shown"),
    ],
)
def test_examples_that_are_not_there_are_refused_at_the_start(
    tmp_path: Path, briefing: Any, data: Any, says: str
) -> None:
    world = write_world(tmp_path)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "solution": "so", "empty": ""} for n in range(3)]
    data = {"path": str(write_rows(tmp_path / "rows.jsonl", rows)), **data}
    run = told(world, {**SHOWN, "pick": "random", **briefing}, data=data)
    with pytest.raises((ConfigError, DataError), match=says):
        load_parts(run, tmp_path)
    assert any(check.level == "error" for check in examine(run, num_prompts=0))


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"count": 0}, "no example is told"),
        ({"count": 1.5}, "no number of things"),
        ({"pick": "closest"}, "there are 'nearest' and 'random'"),
        ({"template": "{prompt}"}, r"no \{examples\}"),
        ({"example": "{problem}"}, r"no \{solution\}"),
        ({"source": " "}, "no text"),
    ],
)
def test_demonstrations_that_cannot_be_read_are_refused(knobs: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_briefing({"kind": "demonstrations", **knobs})


def test_the_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"package bm25s.*pip install 'tropd\[retrieval\]'"):
        found("the train")


def test_the_row_itself_is_left_out_however_the_question_is_worded() -> None:
    rows = [{"prompt": f"Compute: {n}", "question": str(n), "solution": f"s{n}"} for n in range(4)]
    asked = (Message(role="user", content="Compute: 2"),)
    told = Shelf(table_of(rows, "rows"), "question", "solution").pick(
        asked, WithDemonstrations(problem="question", pick="random", count=9), row_of(rows, 2)
    )
    assert sorted(example.solution for example in told) == ["s0", "s1", "s3"]


def row_of(rows: list[dict[str, str]], place: int) -> int:
    return [number for number, _ in table_of(rows, "rows").read()][place]


def test_conversations_with_the_same_last_turn_are_other_questions() -> None:
    def turns(first: str) -> list[dict[str, str]]:
        said = [("user", first), ("assistant", "yes"), ("user", "and now?")]
        return [{"role": role, "content": content} for role, content in said]

    rows = [{"prompt": turns(f"count to {n}"), "solution": f"s{n}"} for n in range(3)]
    asked = tuple(Message(**turn) for turn in turns("count to 1"))
    told = Shelf(table_of(rows, "rows"), "prompt", "solution").pick(
        asked, WithDemonstrations(pick="random", count=9), None
    )
    assert sorted(example.solution for example in told) == ["s0", "s2"]


def test_a_number_that_is_missing_is_no_solution() -> None:
    rows = [{"prompt": "a", "solution": float("nan")}, {"prompt": "b", "solution": 2.0}]
    assert [example.problem for example in Shelf(table_of(rows, "rows"), "prompt", "solution").examples] == ["b"]


def test_another_row_with_the_same_question_is_no_example_either() -> None:
    rows = [{"prompt": f"Compute: {n % 2}", "question": str(n % 2), "solution": f"s{n}"} for n in range(4)]
    asked = (Message(role="user", content="Compute: 1"),)
    told = Shelf(table_of(rows, "rows"), "question", "solution").pick(
        asked, WithDemonstrations(problem="question", pick="random", count=9), row_of(rows, 1)
    )
    assert sorted(example.solution for example in told) == ["s0", "s2"]


def test_a_system_prompt_makes_no_other_question() -> None:
    system = {"role": "system", "content": "Be brief."}
    rows = [{"prompt": [system, {"role": "user", "content": f"q{n}"}], "solution": f"s{n}"} for n in range(3)]
    asked = (Message(role="user", content="q1"),)
    for messages in (asked, (Message(role="system", content="Be long."), *asked)):
        told = Shelf(table_of(rows, "rows"), "prompt", "solution").pick(
            messages, WithDemonstrations(pick="random", count=9), None
        )
        assert sorted(example.solution for example in told) == ["s0", "s2"]
