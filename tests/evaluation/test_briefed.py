"""What a briefing is worth is measured on the same prompts, without it and with it."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from tests.small_runs import merged, write_rows, write_run
from tests.told import COLUMN, write_world
from tropd.cli.main import main

EVALUATION = {"num_samples": 2, "max_new_tokens": 6}
ODD = "def grade(prompts, completions, **columns):\n    return [len(text) % 2 for text in completions]\n"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def run_file(world: Path, folder: Path, briefing: Any = COLUMN, **changes: Any) -> str:
    told = str(world / "told.jsonl")
    said: dict[str, Any] = {"data": {"path": told}, "evaluation": {**EVALUATION, "data": {"path": told}}}
    said["teacher"] = {"path": "start", "briefing": briefing}
    return str(write_run(world, folder, "quick", **merged(said, {"method": {"name": "opd"}, **changes})))


def lines(path: Path) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in map(json.loads, path.read_text().splitlines()[1:])}


def numbers(folder: Path) -> dict[str, float]:
    return json.loads((folder / "summary.json").read_text())["results"]


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(list(argv)) == 2
    return " ".join(capsys.readouterr().err.split())


def test_a_briefed_answer_is_the_answer_to_the_briefed_prompt(world: Path, tmp_path: Path) -> None:
    run = run_file(world, tmp_path / "run")
    assert main(["evaluate", run, "--briefed", "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    rows = [json.loads(line) for line in (world / "told.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "by_hand.jsonl", [{**row, "prompt": f"{row['prompt']} ({row['solution']})"} for row in rows])
    asked = ["--max-new-tokens", "6", "--num-samples", "1", "--device", "cpu"]
    for name, data in (("plain", world / "told.jsonl"), ("hand", tmp_path / "by_hand.jsonl")):
        out = ["-o", str(tmp_path / name)]
        assert main(["evaluate", str(world / "student"), "--data", str(data), *asked, *out]) == 0
    briefed, plain = lines(tmp_path / "out" / "briefed.jsonl"), lines(tmp_path / "out" / "items.jsonl")
    by_hand, without = lines(tmp_path / "hand" / "items.jsonl"), lines(tmp_path / "plain" / "items.jsonl")
    assert [row["greedy"] | {"score": 0} for row in briefed.values()] == [
        row["greedy"] | {"score": 0} for row in by_hand.values()
    ]
    assert {i: row["greedy"]["text"] for i, row in plain.items()} == {
        i: row["greedy"]["text"] for i, row in without.items()
    }
    assert [row["greedy"] for row in briefed.values()] != [row["greedy"] for row in plain.values()]


def test_the_gap_is_the_mean_difference_prompt_by_prompt_and_is_drawn_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "odd.py").write_text(ODD)
    asked = ["evaluate", run_file(world, tmp_path / "run"), "--briefed", "--grader", f"{tmp_path}/odd.py:grade"]
    assert main([*asked, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    briefed, plain = (lines(tmp_path / "out" / name) for name in ("briefed.jsonl", "items.jsonl"))
    gap = fmean(fmean(row["scores"]) - fmean(plain[i]["scores"]) for i, row in briefed.items())
    found = numbers(tmp_path / "out")
    assert found["gap"] == pytest.approx(gap) and found["gap/low"] <= gap <= found["gap/high"]
    assert found["gap"] == pytest.approx(found["briefed/avg@2"] - found["avg@2"])
    assert f"predictive gap {gap:+.3f} [" in said and "with that of the teacher: avg@2" in said
    before = (tmp_path / "out" / "briefed.jsonl").read_bytes()
    assert main([*asked, "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "briefed.jsonl").read_bytes() == before and numbers(tmp_path / "out") == found


def test_a_readers_briefing_and_that_of_a_runs_folder_are_measured_too(world: Path, tmp_path: Path) -> None:
    hint = {"kind": "column", "column": "kind", "template": "{prompt} {value}"}
    changes = {"readers": {"hinted": {"briefing": hint}}, "steps": 1}
    assert main(["train", run_file(world, tmp_path / "run", **changes)]) == 0
    folders = {"teacher": [], "hinted": ["--reader", "hinted"]}
    for name, reader in folders.items():
        asked = ["evaluate", str(tmp_path / "run"), "--briefed", *reader]
        assert main([*asked, "--device", "cpu", "-o", str(tmp_path / name)]) == 0
    teacher, hinted = (lines(tmp_path / name / "briefed.jsonl") for name in folders)
    assert teacher.keys() == hinted.keys() and teacher != hinted
    assert lines(tmp_path / "teacher" / "items.jsonl") == lines(tmp_path / "hinted" / "items.jsonl")


def test_examples_are_those_of_the_run_and_never_held_out_ones(world: Path, tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="the extra 'retrieval' is not installed")
    write_rows(tmp_path / "held.jsonl", [{"prompt": "7+8=", "answer": "15"}, {"prompt": "9+9=", "answer": "18"}])
    shots = {"kind": "demonstrations", "count": 1, "pick": "random"}
    run = run_file(world, tmp_path / "run", shots, evaluation={"data": {"path": str(tmp_path / "held.jsonl")}})
    assert main(["evaluate", run, "--briefed", "--device", "cpu", "-o", str(tmp_path / "out")]) == 0
    assert len(lines(tmp_path / "out" / "briefed.jsonl")) == 2


def test_what_cannot_be_measured_is_refused_in_words(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held = tmp_path / "held.jsonl"
    write_rows(held, [{"prompt": "7+8=", "answer": "15"}])
    run = run_file(world, tmp_path / "run")
    nothing = run_file(world, tmp_path / "nothing", "as_student")
    peers = run_file(world, tmp_path / "peers", {"kind": "peers"}, rollout={"num_rollouts": 2})
    for said, argv in {
        "the teacher is told nothing that the student is not": [nothing, "--briefed"],
        "is told of responses (briefing 'peers'), and there are none": [peers, "--briefed"],
        "the run has no reader 'teachr' (did you mean 'teacher'?)": [run, "--briefed", "--reader", "teachr"],
        "without --briefed none is": [run, "--reader", "teacher"],
        "is a model. Give a run file": [str(world / "student"), "--briefed", "--data", str(held)],
        "column 'solution', but": [run, "--briefed", "--data", str(held)],
        "there is no grader": [run, "--briefed", "--grader", "None"],
        "leaves the model room": [run, "--briefed", "--max-new-tokens", "240"],
        "is a run file. Give the run's folder": [run, "--briefed", "--step", "2"],
    }.items():
        assert said in refused(capsys, "evaluate", *argv, "--device", "cpu", "-o", str(tmp_path / "out")), argv
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [{"split": "test"}, {"name": "main"}])
def test_examples_of_rows_that_cannot_be_read_again_are_refused(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: dict[str, str]
) -> None:
    path = {"path": str(world / "told.jsonl")}
    run = run_file(world, tmp_path / "run", {"kind": "demonstrations"}, data={**path, **data})
    said = refused(capsys, "evaluate", run, "--briefed", "--device", "cpu", "-o", str(tmp_path / "out"))
    assert "Name a data set in briefing.source" in said
