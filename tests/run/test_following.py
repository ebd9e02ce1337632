"""A teacher follows the student by its rule, and by nothing else; a run that is killed goes on exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import run_case
from tests.kills import kill_at, recorded
from tests.small_runs import values_of, write_run
from tests.told import COLUMN, write_world
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.monitoring.display import Silent
from tropd.run.start import train

LORA = {"lora": {"rank": 4, "alpha": 8, "dropout": 0.1}}
STUDENTS: dict[str, dict[str, Any]] = {"whole": {}, "adapter": LORA, "half": {"dtype": "bfloat16"}}
GATED = {"rule": "gated", "min_steps": 3, "rise": 0.0, "tail": 9.0, "clipped": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def written(world: Path, directory: Path, teacher: dict[str, Any], **changes: Any) -> Path:
    values = {
        "steps": 4,
        "data": {"path": str(world / "told.jsonl")},
        "method": {"name": "opsd"},
        "optimizer": {"learning_rate": 1e-2},
        "alarms": {"mismatch": "off"},
        "rollout": {"save_every": 1},
        "teacher": {"path": "start", "briefing": COLUMN, **teacher},
        **changes,
    }
    return write_run(world, directory, "quick", **values)


def trained(world: Path, directory: Path, teacher: dict[str, Any], **changes: Any) -> Path:
    return train(Run.load(written(world, directory, teacher, **changes)), display=Silent())


def taught(directory: Path) -> list[dict[str, Any]]:
    """What the steps of a run have in common whatever the teacher's rule is called."""
    lines = [json.loads(line) for line in (directory / "records.jsonl").read_text().splitlines()[1:]]
    for line in lines:
        line.pop("seconds")
        line["probes"] = {name: x for name, x in line["probes"].items() if not name.startswith("follow/")}
    return lines


def probes_of(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line)["probes"] for line in (directory / "records.jsonl").read_text().splitlines()[1:]]


def tensors(directory: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Student and teacher after so many steps, by the same names; the student in float32 where that is kept."""
    saved = checkpoints.load(checkpoints.place_of(directory, step))
    teacher = {name.removeprefix("teacher."): x for name, x in saved.teachers.items()}
    return {n: saved.optimizer.get(f"master.{n}", saved.weights[n]) for n in teacher}, teacher


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(x.to(other[n].dtype), other[n]) for n, x in one.items())


@pytest.mark.parametrize("student", STUDENTS)
@pytest.mark.parametrize(
    "rule", [{"rule": "ema", "decay": 0.0}, {"rule": "copy", "every": 1}], ids=["decay 0", "copy every step"]
)
def test_decay_0_and_a_copy_every_step_are_the_live_student_bit_for_bit(
    rule: dict[str, Any], student: str, world: Path, tmp_path: Path
) -> None:
    following = trained(world, tmp_path / "run", {"follow": rule}, student=STUDENTS[student])
    live = trained(world, tmp_path / "live", {"path": "student"}, student=STUDENTS[student])
    assert taught(following) == taught(live) and len(taught(live)) == 4


@pytest.mark.parametrize("student", STUDENTS)
def test_decay_1_is_the_frozen_teacher_bit_for_bit(student: str, world: Path, tmp_path: Path) -> None:
    following = trained(world, tmp_path / "run", {"follow": {"rule": "ema", "decay": 1.0}}, student=STUDENTS[student])
    frozen = {} if student != "half" else {"dtype": "bfloat16"}
    still = trained(world, tmp_path / "still", frozen, student=STUDENTS[student])
    assert taught(following) == taught(still) and len(taught(still)) == 4
    live = trained(world, tmp_path / "live", {"path": "student"}, student=STUDENTS[student])
    assert taught(live) != taught(still), "what does not move proves nothing"


@pytest.mark.parametrize("student", STUDENTS)
def test_an_average_is_that_of_the_students_of_the_steps_in_float32(student: str, world: Path, tmp_path: Path) -> None:
    rule = {"rule": "ema", "decay": 0.999, "every": 2}
    directory = trained(world, tmp_path / "run", {"follow": rule}, student=STUDENTS[student], steps=5)
    first = tensors(directory, 1)[1]
    expected = {name: x.clone() for name, x in first.items()}
    for step in range(1, 6):
        student_now, teacher = tensors(directory, step)
        if step % 2 == 0:
            expected = {name: x.lerp(student_now[name], 1 - 0.999) for name, x in expected.items()}
        assert same(expected, teacher)
        assert {x.dtype for x in teacher.values()} == {torch.float32}
    assert not same(first, expected), "a thousandth of the way is not lost"


def test_between_two_copies_the_teacher_stands_still(world: Path, tmp_path: Path) -> None:
    directory = trained(world, tmp_path / "run", {"follow": {"rule": "copy", "every": 3}}, steps=5)
    student, teacher = zip(*(tensors(directory, step) for step in range(1, 6)), strict=True)
    assert same(teacher[0], teacher[1]) and not same(student[0], student[1])
    assert same(teacher[2], student[2]) and same(teacher[3], student[2]) and same(teacher[4], student[2])
    probes = probes_of(directory)
    assert [p["follow/age"] for p in probes] == [0, 1, 2, 0, 1]
    assert [p["follow/kl"] for p in probes] == [-p["ratio/mean"] for p in probes]
    assert [p.get("follow/shock") for p in probes[:3] + probes[4:]] == [None] * 4
    assert probes[3]["follow/shock"] == probes[3]["follow/kl"] - probes[2]["follow/kl"] != 0, "the jump across the copy"


KILLED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ema of a whole student": ({}, {"rule": "ema", "decay": 0.9}),
    "ema of an adapter": (LORA, {"rule": "ema", "decay": 0.9, "every": 2}),
    "ema in half precision": ({"dtype": "bfloat16"}, {"rule": "ema", "decay": 0.99}),
    "copy of a whole student": ({}, {"rule": "copy", "every": 3}),
    "inside the gate": (LORA, GATED),
}


@pytest.mark.parametrize("case", KILLED)
def test_a_run_whose_teacher_follows_goes_on_after_a_kill_bit_for_bit(case: str, world: Path, tmp_path: Path) -> None:
    student, rule = KILLED[case]
    changes = {"student": student, "steps": 5, "method": {"name": "tropd", "top_k": 8, "beta": 0.1}}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run_case.train(written(world, whole, {"follow": rule}, **changes), whole)
    assert ended.code == 0, ended.said
    kill_at(written(world, killed, {"follow": rule}, **changes), killed, [(recorded(2), 0.0)])
    assert run_case.trace(killed) == run_case.trace(whole)
    moved = [tensors(killed, step)[1] for step in (1, 2, 3, 5)]
    assert not same(moved[0], moved[3])
    assert "inside" not in case or (same(moved[0], moved[1]) and same(moved[2], tensors(killed, 3)[0]))


def test_what_the_gate_remembers_is_recorded_and_shown(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = trained(world, tmp_path / "run", {"follow": GATED}, steps=4)
    probes = probes_of(directory)
    assert [p["follow/age"] for p in probes] == [0, 1, 2, 0]
    assert [p["follow/steps"] for p in probes] == [0, 0, 3, 3], "the copy that the gate measures from"
    assert all(p["follow/reward"] == 0.0 and p["follow/tail_at_copy"] > 0 for p in probes)
    assert main(["inspect", str(directory), "--step", "1"]) == 0
    assert "remembered after 2 steps: follow.teacher/steps = 0" in capsys.readouterr().out
    assert main(["inspect", str(directory), "--step", "3"]) == 0
    assert "remembered after 4 steps: follow.teacher/steps = 3" in capsys.readouterr().out


def test_several_teachers_follow_each_by_its_own_rule(world: Path, tmp_path: Path) -> None:
    column = {"path": str(world / "told.jsonl"), "teacher_column": "kind"}
    told = {"path": "start", "briefing": COLUMN}
    rules = {"even": {"rule": "ema", "decay": 0.5}, "odd": {"rule": "copy", "every": 2}}
    teachers = {name: {**told, "follow": rule} for name, rule in rules.items()}
    run = Run.from_dict(
        values_of(world, "quick", output=str(tmp_path / "run"), student=LORA, teachers=teachers, data=column, steps=3)
        | {"teacher": {}, "method": {"name": "opsd"}}
    )
    directory = train(run, display=Silent())
    saved = [checkpoints.load(checkpoints.place_of(directory, step)) for step in (1, 2, 3)]
    for name, weight in saved[1].weights.items():
        before, even = (s.teachers[f"teachers.even.{name}"] for s in saved[:2])
        assert torch.equal(even, before.lerp(weight, 0.5))
        assert torch.equal(saved[1].teachers[f"teachers.odd.{name}"], weight)
        assert torch.equal(saved[2].teachers[f"teachers.odd.{name}"], weight)
    assert [p["follow/teachers.odd/age"] for p in probes_of(directory)] == [0, 1, 0]
    assert [p["follow/teachers.even/age"] for p in probes_of(directory)] == [0, 0, 0]


@pytest.mark.parametrize("student", ["whole", "adapter"])
def test_a_reader_follows_beside_a_teacher_that_stands_still(student: str, world: Path, tmp_path: Path) -> None:
    readers = {"late": {"path": "start", "briefing": COLUMN, "follow": {"rule": "copy", "every": 2}}}
    directory = trained(world, tmp_path / "run", {}, student=STUDENTS[student], readers=readers, steps=3)
    saved = [checkpoints.load(checkpoints.place_of(directory, step)) for step in (1, 2, 3)]
    assert saved[0].teachers.keys() == {f"readers.late.{name}" for name in saved[0].weights}
    for name, weight in saved[1].weights.items():
        late = [s.teachers[f"readers.late.{name}"] for s in saved]
        assert torch.equal(late[1], weight) and torch.equal(late[2], weight)
    assert [p["follow/readers.late/age"] for p in probes_of(directory)] == [0, 1, 0]
