"""Models, teachers, methods, graders and prompts in Python stand for what a run file names."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import tropd
from tests import run_case
from tests.own_package.gentle.grader import holds
from tests.own_package.gentle.teacher import Unsure
from tests.small_runs import write_run
from tropd import OPD, DataConfig, Run, RunEvalConfig, StudentConfig
from tropd.cli.main import main
from tropd.config.models import GIVEN
from tropd.errors import ConfigError, DataError, TropdError
from tropd.monitoring.display import Silent

STEPS = 4


def rows_of(models: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (models / "four.jsonl").read_text().splitlines()]


def pair_of(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def settings(models: Path, directory: Path, **changes: Any) -> Run:
    """A small run that names as little as it can."""
    run = Run.load(write_run(models, directory, steps=STEPS, teacher={"path": str(models / "teacher")}))
    fresh = Run(output=str(directory), steps=STEPS, teacher=run.teacher, student=run.student, data=run.data)
    return replace(fresh, rollout=run.rollout, checkpoint=run.checkpoint, evaluation=run.evaluation, **changes)


def test_everything_is_given_and_given_again(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Local(OPD):
        pass

    def objects() -> dict[str, Any]:
        return {
            "student": pair_of(models / "student"),
            "teacher": Unsure(str(models / "teacher")),
            "method": Local(discount=0.5),
            "grader": holds,
            "prompts": datasets.Dataset.from_list(rows_of(models)),
            "held_out": rows_of(models)[:2],
        }

    whole, parted = tmp_path / "whole", tmp_path / "parted"
    base = settings(models, whole)
    bare = Run(rollout=base.rollout, checkpoint=base.checkpoint, evaluation=base.evaluation, steps=STEPS)
    bare = replace(bare, evaluation=replace(bare.evaluation, data=None))
    tropd.train(replace(bare, output=str(whole)), display=Silent(), **objects())
    tropd.train(replace(bare, output=str(parted), steps=2), display=Silent(), **objects())
    written = Run.load(parted / "run.toml")
    assert written.given == ("student", "teacher", "grader", "prompts", "held_out", "method")
    assert (written.teacher.path, written.data.path, written.method.name) == (GIVEN, GIVEN, f"Local {GIVEN}")
    assert main(["resume", str(parted)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "was given its student and teacher and grader and prompts and held_out and method in Python" in said
    assert f"Go on with tropd.resume('{parted}', student=..., teacher=..." in said and "Traceback" not in said
    tropd.resume(parted, steps=STEPS, display=Silent(), **objects())
    traces = [run_case.trace(folder) for folder in (whole, parted)]
    assert [r["loss"] for r in traces[0]["records"][1:]] == [r["loss"] for r in traces[1]["records"][1:]]
    assert traces[0]["files"]["model/model.safetensors"] == traces[1]["files"]["model/model.safetensors"]
    for command in (["report", str(parted)], ["inspect", str(parted), "--step", "2"]):
        assert main(command) == 0
    assert main(["evaluate", str(parted)]) == 2
    capsys.readouterr()
    for command in ("doctor", "plan"):
        assert main([command, str(parted / "run.toml")]) == 2
        said = " ".join(("".join(capsys.readouterr())).replace("│", " ").split())
        assert "the run was given its student and teacher and grader" in said
    result = tropd.evaluate(parted, rows_of(models), grader=holds)
    assert result.mean is not None and len(result.items) == 4


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("prompts", "the saved stream has num_prompts 4, this one has 3"),
        ("held_out", "of the held-out prompts, prompts changed"),
        ("teacher", "of the teacher, weights changed"),
        ("method", "was begun with another method"),
    ],
)
def test_another_object_than_at_the_start_is_refused(
    begun_with_objects: tuple[Path, dict[str, Any]], changed: str, says: str, models: Path
) -> None:
    directory, objects = begun_with_objects
    others = {
        "prompts": rows_of(models)[:3],
        "held_out": rows_of(models)[1:],
        "teacher": pair_of(models / "student"),
        "method": replace(objects["method"], discount=0.25),
    }
    with pytest.raises(TropdError, match=says):
        tropd.resume(directory, steps=4, display=Silent(), **{**objects, changed: others[changed]})


@pytest.fixture(scope="module")
def begun_with_objects(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    @dataclass(frozen=True, kw_only=True)
    class Local(OPD):
        pass

    directory = tmp_path_factory.mktemp("given") / "run"
    rows = rows_of(models)
    objects: dict[str, Any] = {"method": Local(), "prompts": rows, "held_out": rows[:3]}
    objects["teacher"] = pair_of(models / "teacher")
    tropd.train(replace(settings(models, directory), steps=2), display=Silent(), **objects)
    return directory, objects


@pytest.mark.parametrize(
    ("objects", "says"),
    [
        ({"student": "a folder"}, "student: a str was given. Give a model of AutoModelForCausalLM"),
        ({"teacher": object()}, "teacher: a object was given"),
        ({"prompts": iter([])}, "a list_iterator is given. Give a list of dicts"),
        ({"prompts": [{"prompt": "x"}, 3]}, "row 2 is a int. Give a dict for each"),
        ({"grader": lambda prompts, completions: []}, r"takes no \*\*columns"),
        ({"grader": 3}, "is a int. Give a function"),
        ({"method": "odp"}, "there is no method 'odp'. Did you mean 'opd'"),
    ],
)
def test_an_object_of_the_wrong_kind_is_refused(
    models: Path, tmp_path: Path, objects: dict[str, Any], says: str
) -> None:
    with pytest.raises((ConfigError, DataError), match=says):
        tropd.train(settings(models, tmp_path / "run"), display=Silent(), **objects)
    assert not (tmp_path / "run").exists()


def test_a_student_with_an_adapter_is_given_and_its_base_is_known_again(models: Path, tmp_path: Path) -> None:
    run = settings(models, tmp_path / "run", method=OPD())
    run = replace(run, student=StudentConfig(lora=tropd.LoraConfig(rank=2)), teacher=tropd.TeacherConfig(), steps=1)
    run = replace(run, teacher=tropd.TeacherConfig(path=str(models / "teacher")))
    tropd.train(run, student=pair_of(models / "student")[0], display=Silent())
    written = Run.load(tmp_path / "run" / "run.toml")
    assert (written.given, written.student.path) == (("student",), str(models / "student"))
    with pytest.raises(TropdError, match="of the student, weights changed"):
        tropd.resume(tmp_path / "run", steps=2, student=pair_of(models / "teacher"), display=Silent())


def test_a_model_in_python_is_evaluated_as_its_folder_is(models: Path, tmp_path: Path) -> None:
    how = RunEvalConfig(num_samples=2, max_new_tokens=8)
    rows = rows_of(models)
    file = tropd.evaluate(str(models / "student"), models / "four.jsonl", grader="exact", settings=how)
    model = tropd.evaluate(pair_of(models / "student"), rows, grader="exact", settings=how)
    table = tropd.evaluate(pair_of(models / "student")[0], datasets.Dataset.from_list(rows), settings=how)
    config = tropd.evaluate(models / "student", DataConfig(path=str(models / "four.jsonl")), settings=how)
    results = (file, model, table, config)
    texts = [[answer.text for item in result.items for answer in item.samples] for result in results]
    assert texts[0] == texts[1] == texts[2] == texts[3] and file.mean == model.mean and table.mean is None
    tropd.evaluate(models / "student", rows, grader=holds, settings=how, output=tmp_path / "kept")
    assert len((tmp_path / "kept" / "items.jsonl").read_text().splitlines()) >= 4


def test_callbacks_are_passed_on(models: Path, tmp_path: Path) -> None:
    from tropd.monitoring.callbacks import Callback

    heard: list[int] = []

    class Hears(Callback):
        def on_step(self, record: Any) -> None:
            heard.append(record.step)

    tropd.train(replace(settings(models, tmp_path / "run"), steps=2), display=Silent(), callbacks=[Hears()])
    assert heard == [0, 1] and re.search("(?m)^given = ", (tmp_path / "run" / "run.toml").read_text())
