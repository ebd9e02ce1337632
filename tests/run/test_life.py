"""How runs begin, are stopped, and are made longer."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.small_runs import write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.monitoring.callbacks import Callback
from tropd.monitoring.display import Silent
from tropd.monitoring.records import read_records
from tropd.run.start import resume, train
from tropd.types import StepRecord

FLAT: dict[str, Any] = {"method": {"name": "opd"}, "checkpoint": {"every": 2, "keep": 9}}
"""Nothing in it depends on how long the run is."""


def written(models: Path, directory: Path, **changes: Any) -> Path:
    return write_run(models, directory, **{**FLAT, **changes})


def trained(path: Path, **how: Any) -> Path:
    return train(Run.load(path), display=Silent(), **how)


def test_a_finished_run_made_longer_is_the_longer_run_bit_for_bit(models: Path, tmp_path: Path) -> None:
    short, long = tmp_path / "short", tmp_path / "long"
    trained(written(models, short, steps=3))
    with pytest.raises(ConfigError, match=r"is finished: 3 of 3 steps.*--steps 6"):
        resume(short, display=Silent())
    resume(short, steps=6, display=Silent())
    trained(written(models, long, steps=6))
    assert Run.load(short / "run.toml").steps == 6
    weights = [folder / "model" / "model.safetensors" for folder in (short, long)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    steps = [read_records(folder / "records.jsonl").steps for folder in (short, long)]
    assert [r.loss for r in steps[0]] == [r.loss for r in steps[1]] and len(steps[0]) == 6


def test_a_longer_run_that_was_stopped_goes_on_and_fewer_steps_are_refused(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    trained(written(models, directory, steps=2))
    with pytest.raises(ConfigError, match="2 steps are asked for, but .* has 2 behind it"):
        resume(directory, steps=2, display=Silent())
    assert Run.load(directory / "run.toml").steps == 2
    resume(directory, steps=5, display=Silent(), callbacks=[StopAt(3)])
    assert checkpoints.steps_kept(directory)[-1] == 3
    resume(directory, display=Silent())
    assert [r.step for r in read_records(directory / "records.jsonl").steps] == list(range(5))


class StopAt(Callback):
    """Hears everything, and stops the run after some steps."""

    def __init__(self, steps: int) -> None:
        self.steps, self.heard = steps, list[tuple[str, Any]]()

    def on_step(self, record: StepRecord) -> bool:
        self.heard.append(("step", record.step))
        return record.step + 1 == self.steps

    def on_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        assert numbers
        self.heard.append(("evaluation", step))

    def on_checkpoint(self, folder: Path) -> None:
        assert (folder / "state.json").exists()
        self.heard.append(("checkpoint", folder.name))

    def on_end(self, folder: Path) -> None:
        self.heard.append(("end", folder.name))


class Failing(Callback):
    def on_evaluation(self, step: int, numbers: Mapping[str, float]) -> None:
        raise KeyError("before the first step")


def test_a_callback_hears_of_everything_and_may_stop_the_run(models: Path, tmp_path: Path) -> None:
    callback = StopAt(3)
    assert trained(written(models, tmp_path / "run"), callbacks=[callback]) == tmp_path / "run"
    assert callback.heard == [
        ("evaluation", 0),
        ("step", 0),
        ("step", 1),
        ("checkpoint", "step_000002"),
        ("evaluation", 3),
        ("step", 2),
        ("checkpoint", "step_000003"),
        ("end", "run"),
    ]


def test_a_start_that_fails_leaves_no_folder(models: Path, tmp_path: Path) -> None:
    grader = tmp_path / "refusing_grader.py"
    grader.write_text(
        "def grade(prompts, completions, **columns):\n"
        "    if completions != columns['answer']:\n"
        "        raise ValueError('no opinion')\n"
        "    return [1.0] * len(prompts)\n"
    )
    directory = tmp_path / "new" / "run"
    path = written(models, tmp_path / "given", output=str(directory), grader="refusing_grader:grade")
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.raises(ValueError, match="no opinion"):
            trained(path)
    finally:
        sys.path.remove(str(tmp_path))
    assert not directory.parent.exists()


def test_an_overwritten_run_comes_back_if_the_new_one_does_not_begin(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    trained(written(models, directory, steps=1))
    before = {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    with pytest.raises(ConfigError, match="--overwrite"):
        trained(written(models, directory, steps=1))
    bad = written(models, directory, steps=1, student={"path": str(tmp_path / "nothing")})
    with pytest.raises(ConfigError):
        trained(bad, overwrite=True)
    assert before == {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    with pytest.raises(KeyError):  # of a callback, in the first step of the new run's evaluation
        trained(written(models, directory, steps=2), overwrite=True, callbacks=[Failing()])
    assert before == {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}
    trained(written(models, directory, steps=2), overwrite=True)
    assert len(read_records(directory / "records.jsonl").steps) == 2
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["run"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_command_that_a_signal_stopped_does_not_look_finished(number: int, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = written(models, directory, steps=5000, evaluation={"every": 5000}, checkpoint={"every": 5000})
    command = run_case.command("train", str(path), log=tmp_path / "log")
    while run_case.num_recorded(directory) < 1 and not command.over:
        time.sleep(0.05)
    os.kill(command.process.pid, number)
    ended = command.wait()
    assert ended.code == 128 + number, ended.said
    assert "Traceback" not in ended.said and ended.said.count("Go on with: tropd resume") == 1
    assert checkpoints.steps_kept(directory) == [run_case.num_recorded(directory)]


def test_the_command_line_makes_a_run_longer(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(models, tmp_path / "run", steps=1)
    assert main(["train", str(path)]) == 0
    assert main(["train", str(path)]) == 2 and "--overwrite" in capsys.readouterr().err
    assert main(["resume", str(tmp_path / "run"), "--steps", "2"]) == 0
    assert "2 steps instead of 1" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "checkpoints" / "step_000002" / "state.json").read_text())["steps"] == 2


def test_an_overwritten_link_to_a_folder_stays_a_link(models: Path, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "run").symlink_to("far")
    path = written(models, tmp_path / "run", steps=1)
    trained(path)
    trained(path, overwrite=True)
    with pytest.raises(ConfigError, match="there is no such folder"):
        trained(written(models, tmp_path / "run", teacher={"path": "./nowhere"}), overwrite=True)
    assert (tmp_path / "run").is_symlink() and (tmp_path / "far" / "model").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["far", "run", "run.toml"]


def test_a_run_that_a_killed_start_set_aside_is_not_forgotten(models: Path, tmp_path: Path) -> None:
    (tmp_path / "run.replaced").mkdir()
    with pytest.raises(ConfigError, match="run.replaced exists: a start that was killed has put the run there"):
        trained(written(models, tmp_path / "run"), overwrite=True)


def test_a_closed_pipe_ends_a_run_as_it_ends_every_command(models: Path, tmp_path: Path) -> None:
    path = written(models, tmp_path / "run", steps=400)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = run_case.command("train", str(path), log=tmp_path / "log", output=pipe)
    with pipe.open() as output:
        assert output.readline()
    ended = command.wait()
    assert ended.code == 141 and "Traceback" not in ended.said, ended.said
