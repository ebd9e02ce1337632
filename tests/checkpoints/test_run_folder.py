"""A run destroys nothing: neither what it reads, nor what others keep, nor another run that begins at the same time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import run_case
from tests.run_case import Order
from tests.small_runs import run_of, write_models, write_run
from tropd.checkpoints.run_folder import BEGUN, RUN, begun
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.config.tables import to_dict
from tropd.errors import CheckpointError, ConfigError
from tropd.run.start import resume, train
from tropd.testbeds.beds import TESTBEDS
from tropd.testbeds.embed import embed

OPD = {"name": "opd"}


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Student and data in a folder named as a run would name its own, and a teacher elsewhere."""
    folder = write_models(tmp_path / "prepared")
    work = tmp_path / "work"
    work.mkdir()
    (folder / "student").rename(work / "model")
    (folder / "data.jsonl").rename(work / "data.jsonl")
    (tmp_path / "prepared" / "teacher").rename(tmp_path / "teacher")
    return tmp_path


def run_at(place: Path, output: str) -> Run:
    folder, work = place / "prepared", place / "work"
    teacher, data = {"path": str(place / "teacher")}, {"path": str(work / "data.jsonl")}
    student = {"path": str(work / "model")}
    return run_of(folder, OPD, output=output, steps=1, student=student, teacher=teacher, data=data)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("work", "holds what student.path names"),
        ("work/../work", "holds what student.path names"),
        ("link", "holds what student.path names"),
        ("work/model", "holds what student.path names"),
        (".", "holds what student.path names"),
        ("work/model/run", "lies in what student.path names"),
        ("teacher", "holds what teacher.path names"),
        ("teacher/deep/er", "lies in what teacher.path names"),
        ("work/data.jsonl", "holds what data.path names"),
        ("kept", "holds files that are not this run's: letters, model, notes.txt and 1 more"),
        ("kept/notes.txt", "which is a file"),
    ],
)
def test_a_run_begins_neither_over_its_inputs_nor_over_files_of_others(
    output: str, words: str, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (work / "link").symlink_to(work / "work")
    shutil.copytree(work / "work" / "model", work / "kept" / "model")
    for name in ("notes.txt", "letters", "results.csv"):
        (work / "kept" / name).write_text("mine")
    monkeypatch.chdir(work)
    for place in (output, str(work / output)):
        run = run_at(work, place)
        before = everything(work)
        with pytest.raises(ConfigError, match=words):
            train(run)
        assert everything(work) == before


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("other/run", "lies in what readers.own.path names"),
        ("other", "holds what readers.own.path names"),
        ("shown", "holds what readers.own.briefing.source names"),
        ("steps", "holds what teacher.direction.file names"),
    ],
)
def test_a_run_does_not_begin_over_what_readers_are_and_are_told(output: str, words: str, work: Path) -> None:
    shutil.copytree(work / "teacher", work / "other")
    for name in ("shown", "steps"):
        (work / name).mkdir()
        (work / name / "file").write_text("mine")
    briefing = {"kind": "demonstrations", "source": str(work / "shown" / "file")}
    teacher = {"path": str(work / "teacher"), "direction": {"file": str(work / "steps" / "file"), "layer": 0}}
    own = {"path": str(work / "other"), "briefing": briefing}
    plain = run_at(work, str(work / output))
    run = Run.from_dict({**to_dict(plain), "teacher": teacher, "readers": {"own": own}})
    before = everything(work)
    with pytest.raises(ConfigError, match=words):
        train(run)
    assert everything(work) == before


def test_a_run_begins_in_an_empty_folder_and_over_what_a_killed_start_left(work: Path) -> None:
    directory = work / "run"
    directory.mkdir()
    for name in (BEGUN, "teacher_texts.sqlite-journal", "rank_1_teacher_texts.sqlite"):
        (directory / name).touch()
    train(run_at(work, str(directory)))
    assert (directory / "model").is_dir() and not (directory / BEGUN).exists()


def test_a_start_that_is_refused_leaves_no_run(work: Path) -> None:
    shutil.rmtree(work / "teacher")
    for _ in range(2):
        with pytest.raises(ConfigError, match="teacher"):
            train(run_at(work, str(work / "run")))
    assert not (work / "run" / RUN).exists() and not (work / "run" / BEGUN).exists()


def test_a_run_file_that_is_a_link_to_something_else_is_not_written_through(work: Path) -> None:
    directory, other = work / "run", work / "letter"
    directory.mkdir()
    other.write_text("mine")
    (directory / BEGUN).symlink_to(other)
    with pytest.raises(CheckpointError, match="cannot be written"):
        train(run_at(work, str(directory)))
    assert other.read_text() == "mine"


def test_a_run_does_not_go_on_where_it_would_write_over_what_it_reads(work: Path) -> None:
    directory = train(run_at(work, str(work / "run")))
    text = (directory / RUN).read_text()
    (directory / RUN).write_text(text.replace(str(work / "work" / "model"), str(directory / "model")))
    with pytest.raises(ConfigError, match="holds what student.path names"):
        resume(directory)


def test_of_two_runs_that_begin_in_one_folder_one_is_refused_and_the_other_keeps_its_configuration(
    tmp_path: Path,
) -> None:
    models, directory = write_models(tmp_path / "models"), tmp_path / "run"
    changes = [{"steps": 2, "seed": seed, "evaluation": {"every": 9}} for seed in range(4)]
    paths = [write_run(models, tmp_path / f"run_{n}", "entropy", output=str(directory), **changes[n]) for n in range(4)]
    logs = [tmp_path / f"logs_{n}" for n in range(4)]
    running = [
        run_case.start(Order(train=path, directory=directory, logs=log)) for path, log in zip(paths, logs, strict=True)
    ]
    ended = [one.wait() for one in running]
    (winner,) = [n for n, one in enumerate(ended) if one.code == 0]
    assert Run.load(directory / RUN).seed == winner
    for number, one in enumerate(ended):
        if number != winner:
            assert one.error in ("CheckpointError", "ConfigError"), one.said
            assert "another process is at work" in one.message or "holds a run already" in one.message
    alone = tmp_path / "alone"
    path = write_run(models, alone, "entropy", **changes[winner])
    assert run_case.train(path, alone).code == 0
    assert run_case.trace(alone)["files"] == run_case.trace(directory)["files"]


def test_the_lock_is_there_before_the_first_byte_and_goes_with_its_holder(work: Path) -> None:
    run, directory = run_at(work, str(work / "run")), work / "run"
    with begun(run, directory) as place:
        before = everything(directory)
        with pytest.raises(CheckpointError, match="another process is at work"):
            train(run_at(work, str(directory)))
        place.settle()
        with pytest.raises(CheckpointError, match="another process is at work"):
            resume(directory)
        assert everything(directory) == {RUN: before[BEGUN]}
    resume(directory)


def test_an_evaluation_replaces_no_summary_of_others(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "summary.json").write_text("mine")
    data, model = work / "work" / "data.jsonl", work / "work" / "model"
    ask = ["evaluate", str(model), "--data", str(data), "--limit", "1", "--max-new-tokens", "2", "-o", str(work)]
    assert main(ask) != 0 and "no evaluation's" in capsys.readouterr().err
    assert (work / "summary.json").read_text() == "mine" and not (work / "items.jsonl").exists()


def test_models_of_a_package_are_not_made_over_something_else(tmp_path: Path) -> None:
    (tmp_path / "letters").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        embed([TESTBEDS["nano-mild"]], 0, tmp_path)
    assert (tmp_path / "letters").read_text() == "mine"


def pushed_aside(folder: Path) -> Path:
    (folder / "merged.tmp").mkdir()
    (folder / "merged.tmp" / "mine").write_text("mine")
    return folder / "merged"


def inside_a_model(folder: Path) -> Path:
    return folder / "work" / "run" / "model" / "merged"


def already_there(folder: Path) -> Path:
    (folder / "merged").mkdir()
    return folder / "merged"


@pytest.mark.parametrize(
    ("place", "words"),
    [(pushed_aside, "merged.tmp exists"), (inside_a_model, "lies in"), (already_there, "exists already")],
)
@pytest.mark.parametrize("command", ["export", "merge"])
def test_what_is_exported_or_merged_replaces_nothing(
    command: str, place: Callable[[Path], Path], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_models(tmp_path / "work")
    student = {"path": str(folder / "student"), "lora": {"rank": 2, "alpha": 4}}
    directory = train(run_of(folder, OPD, steps=1, student=student))
    output = place(tmp_path)
    before = everything(tmp_path)
    source = directory if command == "export" else directory / "model"
    assert main([command, str(source), "-o", str(output)]) != 0
    assert words in " ".join(capsys.readouterr().err.split())
    assert everything(tmp_path) == before
    assert not os.path.lexists(output) or place is already_there
