"""A pair is complete or not there, the same for the same seed, and ready for a run."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest

from tropd.config.models import StudentConfig, TeacherConfig
from tropd.config.run import Run
from tropd.config.stages import DataConfig, RolloutConfig, RunEvalConfig
from tropd.errors import ConfigError, TeacherError
from tropd.methods import OPD
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.testbeds import TESTBEDS, Pair, Testbed, make_pair
from tropd.testbeds.task import Shape
from tropd.types import StepRecord


def hurried(name: str = "nano-hard", **changes: object) -> Testbed:
    """A testbed with a few steps of training, whose teacher knows nothing."""
    bed = TESTBEDS[name]
    short = {
        "teacher": Shape(width=16, layers=1, heads=2, hidden=16),
        "teacher_training": tuple(dataclasses.replace(each, steps=2) for each in bed.teacher_training),
        "student_training": tuple(dataclasses.replace(each, steps=2) for each in bed.student_training),
        "teacher_accuracy": 0.0,
        "num_train": 40,
        "num_held_out": 20,
    }
    return dataclasses.replace(bed, **{**short, **changes})


def first_step(pair: Pair, folder: Path) -> StepRecord:
    """Of a run that reads nothing but the pair."""
    run = Run(
        student=StudentConfig(path=str(pair.student)),
        teacher=TeacherConfig(path=str(pair.teacher)),
        data=DataConfig(path=str(pair.prompts)),
        method=OPD(),
        rollout=RolloutConfig(num_prompts=4, num_rollouts=1, max_new_tokens=pair.max_new_tokens),
        evaluation=RunEvalConfig(data=DataConfig(path=str(pair.held_out)), num_samples=1, max_new_tokens=8),
        grader=pair.grader,
        steps=1,
        device="cpu",
        output=str(folder),
    )
    (record,) = read_records(train(run) / "records.jsonl").steps
    return record


def contents(folder: Path) -> dict[str, bytes]:
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in files.items() if name != "pair.json"}  # it holds seconds


def test_a_pair_is_made_again_bit_for_bit_and_another_seed_makes_another(tmp_path: Path) -> None:
    bed = hurried()
    pairs = [make_pair(bed, seed, tmp_path / name) for seed, name in ((3, "a"), (3, "b"), (4, "c"))]
    first, again, other = (contents(tmp_path / name) for name in "abc")
    assert first == again
    weights = [f"{whose}/model.safetensors" for whose in ("teacher", "student")]
    assert all(first[name] != other[name] for name in (*weights, "prompts.jsonl", "held_out.jsonl"))
    assert first[weights[0]] != first[weights[1]]
    facts = [{k: v for k, v in pair.facts.items() if "seconds" not in k} for pair in pairs]
    assert facts[0] == facts[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_pair_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    bed = hurried()
    pair = make_pair(bed, 0, tmp_path / "pair")
    made = (pair.teacher / "model.safetensors").stat().st_mtime_ns
    assert make_pair(bed, 0, tmp_path / "pair") == pair
    assert make_pair(dataclasses.replace(bed, steps=7, learning_rate=1.0), 0, tmp_path / "pair") == pair
    assert (pair.teacher / "model.safetensors").stat().st_mtime_ns == made
    for other, seed in ((bed, 1), (hurried(num_train=41), 0), (hurried("nano-mild"), 0)):
        with pytest.raises(ConfigError, match="another recipe"):
            make_pair(other, seed, tmp_path / "pair")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="something else than a pair"):
        make_pair(hurried(), 0, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_teacher_that_does_not_learn_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"no teacher of testbed 'nano-hard' with seed 0 solves 90%.*solves \d+%"):
        make_pair(hurried(teacher_accuracy=0.9), 0, tmp_path / "pair")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_can_be_shared_and_a_student_can_be_smaller(tmp_path: Path) -> None:
    one = make_pair(hurried(), 0, tmp_path / "one")
    two = make_pair(hurried("nano-mild"), 0, tmp_path / "two", teacher=one.teacher)
    assert contents(one.teacher) == contents(two.teacher) and contents(one.student) != contents(two.student)
    small = make_pair(hurried(student=Shape(width=8, layers=1, heads=1, hidden=8)), 0, tmp_path / "small")
    assert small.facts["student_parameters"] < small.facts["teacher_parameters"] == one.facts["teacher_parameters"]


def test_no_prompt_stands_twice_and_too_many_are_refused(tmp_path: Path) -> None:
    pair = make_pair(hurried(), 0, tmp_path / "pair")
    rows = [json.loads(line) for path in (pair.prompts, pair.held_out) for line in path.read_text().splitlines()]
    assert len(rows) == len({row["prompt"] for row in rows}) == 60
    few = dataclasses.replace(TESTBEDS["nano-hard"].task, operations=(1, 1))  # type: ignore[type-var]
    with pytest.raises(ConfigError, match="no more than about 50"):
        make_pair(hurried(task=few), 0, tmp_path / "few")


def test_a_pair_is_what_a_run_reads(tmp_path: Path) -> None:
    pair = make_pair(hurried(), 0, tmp_path / "pair")
    record = first_step(pair, tmp_path / "run")
    assert record.gradient_norm > 0 and math.isfinite(record.loss)
    assert record.evaluation is not None and record.evaluation["num_prompts"] == 20
