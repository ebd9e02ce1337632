"""A method, a teacher and a grader of one's own go through the whole life of a run by their names."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import tropd
from tests import run_case
from tests.base.test_names import PACKAGE
from tests.own_package.gentle.grader import holds, shortness
from tests.own_package.gentle.method import Gentle
from tests.small_runs import write_run
from tropd import Run
from tropd.cli.main import main
from tropd.errors import ConfigError
from tropd.monitoring.display import Silent
from tropd.monitoring.records import read_records
from tropd.testing import some_rollouts

STEPS = 4


def named(models: Path) -> dict[str, Any]:
    """The own package in a run file."""
    return {
        "steps": STEPS,
        "method": {"name": f"{PACKAGE}/gentle/method.py:Gentle", "bound": 3.0},
        "teacher": {"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"path": str(models / "teacher")}},
        "grader": f"{PACKAGE}/gentle/grader.py:Holds",
    }


@pytest.fixture(scope="module")
def by_name(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("named") / "run"
    ended = run_case.train(write_run(models, directory, **named(models)), directory)
    assert ended.code == 0, ended.said
    return directory


def test_a_run_of_ones_own_parts_that_is_killed_goes_on_exactly(models: Path, tmp_path: Path, by_name: Path) -> None:
    directory = tmp_path / "run"
    running = run_case.start(run_case.Order(train=write_run(models, directory, **named(models)), directory=directory))
    assert running.kill_when(lambda: run_case.num_recorded(directory) >= 3)
    ended = run_case.resume(directory)
    assert ended.code == 0, ended.said
    assert run_case.trace(directory) == run_case.trace(by_name)
    header = read_records(directory / "records.jsonl").header
    assert (header["method"], header["teacher"]) == ("method.py:Gentle", "teacher.py:Unsure")


def test_commands_that_only_look_import_nothing_unless_asked(
    by_name: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*command: str | Path) -> tuple[int, str]:
        code = main([str(part) for part in command])
        said = capsys.readouterr()
        return code, " ".join((said.out + said.err).replace("│", " ").split())

    assert run("report", by_name, "-o", tmp_path / "report.html")[0] == 0
    assert "method.py:Gentle" in (tmp_path / "report.html").read_text()
    assert run("export", by_name, "-o", tmp_path / "model")[0] == 0
    assert "distilled with Gentle" in (tmp_path / "model" / "README.md").read_text()
    code, said = run("inspect", by_name, "--step", "2")
    assert code == 0 and "rollouts" in said
    code, said = run("evaluate", by_name, "-o", tmp_path / "scores")
    assert code == 2 and "Read it, then add --trust-code" in said
    assert run("evaluate", by_name, "--trust-code", "-o", tmp_path / "scores")[0] == 0
    assert run("evaluate", by_name, "--grader", "exact", "-o", tmp_path / "exact")[0] == 0
    file = by_name.with_suffix(".toml")
    (tmp_path / "rollouts.jsonl").write_text("")
    for command in (("doctor", file), ("plan", file), ("score", file, tmp_path / "rollouts.jsonl", "-o", "x.jsonl")):
        code, said = run(*command)
        assert code == 2 and "method.name" in said and "teacher.path" in said, command
        assert "Read it, then add --trust-code" in said, command
    code, said = run(
        "doctor", file, "--trust-code", "--sample-prompts", "2", "--sample-tokens", "8", "--output", tmp_path / "new"
    )
    assert "the teacher is your own" in said and "0 errors" in said, said
    assert run("plan", file, "--trust-code")[0] == 0


def test_a_comparison_takes_ones_own_method_and_knows_it_again(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = write_run(models, tmp_path / "bed", steps=2, method={"name": "opd"}, grader="exact")
    (tmp_path / "own.py").write_text((PACKAGE / "gentle/method.py").read_text().replace("from .bounds", "from bounds"))
    (tmp_path / "bounds.py").write_text("WIDEST = 4.0\n")
    lab = tmp_path / "lab.toml"
    lab.write_text(
        f"output = '{tmp_path}/lab'\ntestbeds = ['{bed}']\nseeds = [0]\nlearning_rates = [0.001]\n"
        "[methods.OPD]\nname = 'opd'\n[methods.mine]\nname = 'own.py:Gentle'\nbound = 2.0\n"
    )
    for _ in range(2):
        assert main(["compare", str(lab), "--workers", "1", "--no-figures"]) == 0
    assert "2 outcomes are there already; 0 trials to go" in capsys.readouterr().out
    lab.write_text(lab.read_text().replace("bound", "bund"))
    assert main(["compare", str(lab), "--no-figures"]) == 2
    assert "unknown key 'methods.mine.bund'; did you mean 'bound'" in capsys.readouterr().err


def test_objects_that_a_file_can_name_need_not_be_given_again(models: Path, tmp_path: Path, by_name: Path) -> None:
    directory = tmp_path / "run"
    run = Run.load(write_run(models, directory, **named(models)))
    tropd.train(replace(run, steps=2), method=Gentle(bound=3.0), grader=shortness, display=Silent())
    written = Run.load(directory / "run.toml")
    assert written.given == () and written.method.name == f"{PACKAGE}/gentle/method.py:Gentle"
    assert written.grader == f"{PACKAGE}/gentle/grader.py:shortness"
    tropd.resume(directory, steps=3, display=Silent())


def test_what_is_in_the_file_is_not_given_again(by_name: Path) -> None:
    with pytest.raises(ConfigError, match="has its grader in run.toml, and goes on with that: give none"):
        tropd.resume(by_name, steps=9, grader=holds, display=Silent())


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"pth": "x"}}, r"no knob 'pth' .did you mean 'path'"),
        ({"path": f"{PACKAGE}/gentle/teacher.py:Unsure"}, "needs path, which has no default"),
        ({"path": f"{PACKAGE}/gentle/grader.py:Holds"}, "is a Holds. Give a class that inherits from tropd.Teacher"),
        ({"path": "somewhere", "knobs": {"a": 1}}, "teacher.path is somewhere, which takes no knobs"),
        ({"path": "a.py:B", "servers": ["http://x"]}, "a teacher of your own: they would never be asked"),
    ],
)
def test_a_teacher_that_cannot_be_made_is_told(
    models: Path, tmp_path: Path, teacher: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        path = write_run(models, tmp_path / "run", **{**named(models), "teacher": teacher})
        tropd.train(Run.load(path), display=Silent())


def test_one_of_several_teachers_is_ones_own(models: Path, tmp_path: Path) -> None:
    own = {"path": f"{PACKAGE}/gentle/teacher.py:Unsure", "knobs": {"path": str(models / "teacher")}}
    path = write_run(
        models,
        tmp_path / "run",
        **{
            **named(models),
            "steps": 1,
            "teacher": {"path": "base"},
            "teachers": {"even": own, "odd": {"path": str(models / "teacher")}},
            "data": {"teacher_column": "kind"},
        },
    )
    directory = tropd.train(Run.load(path, ["--teachers.even.knobs.share", "0.2"]), display=Silent())
    assert Run.load(directory / "run.toml").teachers["even"].knobs["share"] == 0.2
    probes = read_records(directory / "records.jsonl").steps[0].probes
    assert {"teachers/even/ratio/mean", "teachers/odd/ratio/mean"} <= set(probes)


def test_rollouts_are_scored_by_ones_own_teacher(by_name: Path, tmp_path: Path) -> None:
    rollouts = some_rollouts(99, lengths=[(3, 6), (1, 9)])
    lines = [json.dumps(asdict(rollout), default=lambda x: getattr(x, "value", str(x))) for rollout in rollouts]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(lines) + "\n")
    command = ["score", str(by_name.with_suffix(".toml")), str(tmp_path / "rollouts.jsonl"), "-o", str(tmp_path / "s")]
    assert main([*command, "--trust-code", "--grader", f"{PACKAGE}/gentle/grader.py:shortness"]) == 0
    scored = [json.loads(line) for line in (tmp_path / "s").read_text().splitlines()]
    assert [len(line["teacher_logprobs"]) for line in scored] == [6, 9] and all(line["reward"] for line in scored)


def test_a_method_that_needs_texts_says_so_of_a_teacher_that_writes_none(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", **{**named(models), "method": {"name": "seqkd"}})
    with pytest.raises(ConfigError, match="needs the teacher's texts, but a Unsure writes none"):
        tropd.train(Run.load(path), display=Silent())
