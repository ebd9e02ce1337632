"""What goes wrong around a run ends in words, and never takes with it what was saved before."""

from __future__ import annotations

import math
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import run_case
from tests.run_case import Order, loadable
from tests.small_runs import save_model, write_run
from tests.tiny import VOCAB, byte_tokenizer, tiny_model
from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.run_folder import locked
from tropd.config.run import Run
from tropd.config.tables import to_dict
from tropd.errors import CheckpointError, ConfigError
from tropd.monitoring.records import read_records
from tropd.run import start
from tropd.training.kept_batch import load_batch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_saves_and_says_how_to_go_on(number: int, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, checkpoint={"every": 6}, evaluation={"every": 6})
    ended = run_case.train(path, directory, stop_after=2, signals=(number,))
    assert ended.code == 0, ended.said
    assert "stopping after this step" in ended.said and f"Go on with: tropd resume {directory}" in ended.said
    assert loadable(directory) == [2] and run_case.num_recorded(directory) == 2
    assert run_case.resume(directory).code == 0
    assert [record.step for record in read_records(directory / "records.jsonl").steps] == list(range(6))


def test_a_second_interrupt_stops_at_once_and_the_run_still_goes_on(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, checkpoint={"every": 6}, evaluation={"every": 6})
    ended = run_case.train(path, directory, stop_after=2, signals=(signal.SIGINT, signal.SIGINT))
    assert ended.error == "KeyboardInterrupt" and checkpoints.steps_kept(directory) == []
    assert run_case.resume(directory).code == 0


def test_two_processes_cannot_work_on_one_run(copied: Path) -> None:
    path = copied / "run.toml"
    with locked(copied), pytest.raises(CheckpointError, match="another process"):
        start.resume(copied)
    assert path.exists()
    assert run_case.resume(copied).code == 0, "the lock is gone with its holder"


OFTEN: dict[str, Any] = {"checkpoint": {"every": 1, "keep": 9}}


def limit_files(num_bytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, full after a few checkpoints."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True).returncode:
        pytest.skip("mounting a file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


@pytest.fixture(scope="module")
def with_room(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run leaves that always had room."""
    directory = tmp_path_factory.mktemp("straight") / "run"
    assert run_case.train(write_run(models, directory, **OFTEN), directory).code == 0
    return run_case.trace(directory)


def fill_and_go_on(models: Path, with_room: dict[str, Any], disk: Path, tmp_path: Path, size: str) -> run_case.Ended:
    """Run until the disk is full, make room, go on, and compare with a run that always had room."""
    remount(disk, f"size={size}")
    directory = disk / "run"
    path = write_run(models, tmp_path / "run", output=str(directory), **OFTEN)
    ended = run_case.start(Order(train=path, directory=directory, logs=tmp_path)).wait()
    loadable(directory)
    assert not list(directory.glob("checkpoints/*.tmp")) and not (directory / "model").exists()
    remount(disk, "size=16m")
    order = Order(train=None if (directory / "run.toml").exists() else path, directory=directory, logs=tmp_path)
    again = run_case.start(order).wait()
    assert again.code == 0, again.said
    assert run_case.trace(directory) == with_room
    return ended


def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    models: Path, with_room: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    ended = fill_and_go_on(models, with_room, small_disk, tmp_path, "1m")
    assert ended.error == "CheckpointError" and str(small_disk / "run") in ended.message, ended.said
    assert "No space left" in ended.message


@pytest.mark.slow
@pytest.mark.parametrize("num_pages", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, *range(60, 550, 20)])
def test_wherever_the_disk_is_full_the_run_goes_on_when_there_is_room(
    num_pages: int, models: Path, with_room: dict[str, Any], small_disk: Path, tmp_path: Path
) -> None:
    ended = fill_and_go_on(models, with_room, small_disk, tmp_path, f"{4 * num_pages}k")
    assert ended.error in ("CheckpointError", "TeacherError") and str(small_disk / "run") in ended.message, ended.said


def test_a_disk_that_became_read_only_is_told(models: Path, small_disk: Path, tmp_path: Path) -> None:
    directory = small_disk / "run"
    path = write_run(models, directory)
    assert run_case.start(Order(train=path, directory=directory, logs=tmp_path, stop_after=2)).wait().code == 0
    remount(small_disk, "ro")
    ended = run_case.start(Order(directory=directory, logs=tmp_path)).wait()
    assert ended.error == "CheckpointError" and str(directory) in ended.message, ended.said
    assert "Read-only" in ended.message and loadable(directory) == [2]


def test_a_file_that_may_not_grow_leaves_the_checkpoint_before_it(copied: Path) -> None:
    before = {p: p.read_bytes() for p in sorted(copied.glob("checkpoints/*/*"))}
    limit = (copied / "checkpoints/step_000005/optimizer.safetensors").stat().st_size - 1
    ended = run_case.resume(copied, prepare=partial(limit_files, limit))
    assert ended.error == "CheckpointError" and str(copied) in ended.message, ended.said
    assert loadable(copied) == [2, 3, 4, 5] and before == {p: p.read_bytes() for p in before}
    assert not list(copied.rglob("*.tmp"))


def test_a_folder_that_cannot_be_made_is_told_before_models_are_read(models: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    directory = blocked / "run"
    (tmp_path / "no model").mkdir()
    run = Run.load(write_run(models, tmp_path / "run", student={"path": str(tmp_path / "no model")}))
    with pytest.raises(CheckpointError, match=str(directory)):
        start.train(Run.from_dict({**to_dict(run), "output": str(directory)}, "test"))


def save_teacher(tmp_path: Path, change: Callable[[Any], object], family: str = "qwen3") -> dict[str, Any]:
    """A teacher whose weights are not what they should be."""
    model = tiny_model(family, seed=1)
    with torch.no_grad():
        change(model)
    save_model(tmp_path / "teacher", model)
    return {"teacher": {"path": str(tmp_path / "teacher")}}


def fill(model: Any, value: float) -> None:
    for parameter in model.parameters():
        parameter.fill_(value)


def spoil_one_token(model: Any) -> None:
    """Every prompt ends with it, and nothing else is wrong with the model."""
    model.model.embed_tokens.weight[byte_tokenizer().encode("=")[0]] = torch.nan


def nothing_left(directory: Path) -> bool:
    return not (directory / "model").exists() and not (directory / "checkpoints").exists()


def test_a_teacher_of_nan_is_refused_before_the_first_step(models: Path, tmp_path: Path) -> None:
    changes = save_teacher(tmp_path, partial(fill, value=torch.nan))
    run = Run.load(write_run(models, tmp_path / "run", **changes))
    with pytest.raises(ConfigError, match="not finite"):
        start.train(run)
    assert not (tmp_path / "run" / "run.toml").exists() and not list((tmp_path / "run").glob("*.tmp"))


def test_scores_that_are_nan_are_never_trained_on_and_their_batch_is_kept(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, "entropy", **save_teacher(tmp_path, spoil_one_token))
    ended = run_case.train(path, directory)
    assert ended.error == "TeacherError" and "not finite" in ended.message, ended.said
    assert str(directory / "batches" / "step_000000") in ended.message
    batch = load_batch(directory, 0)
    assert len(batch.rollouts) == 6 and batch.tokens.peek("teacher_logprobs_N") is None
    assert run_case.num_recorded(directory) == 0 and nothing_left(directory)


def test_a_teacher_that_cannot_write_is_named(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    ended = run_case.train(write_run(models, directory, **save_teacher(tmp_path, spoil_one_token)), directory)
    assert ended.error == "TeacherError" and "the teacher cannot write" in ended.message, ended.said
    assert run_case.read_texts(directory / "teacher_texts.sqlite") == [] and nothing_left(directory)


def test_a_teacher_without_weights_stops_the_run_by_the_alarm_of_its_name(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    changes = save_teacher(tmp_path, partial(fill, value=0.0))
    ended = run_case.train(write_run(models, directory, **changes), directory)
    assert ended.error == "TrainingDiverged" and 'alarms.uniform_teacher = "warn"' in ended.message, ended.said
    teacher_N = load_batch(directory, 0).tokens.teacher_logprobs_N
    torch.testing.assert_close(teacher_N, torch.full_like(teacher_N, -math.log(262)))
    assert nothing_left(directory)


def forbid_most_tokens(model: Any) -> None:
    """log pi_T is 0 or -1e30 whatever was written before: finite, as is the loss, but not the gradient's norm."""
    model.transformer.ln_f.weight.fill_(0.0)
    model.transformer.ln_f.bias.fill_(0.0)[0] = 1.0
    model.lm_head.weight.fill_(0.0)[:200, 0] = -1e30


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_not_applied(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    changes = {**save_teacher(tmp_path, forbid_most_tokens, "gpt2"), "checkpoint": {"every": 1}}
    ended = run_case.train(write_run(models, directory, "entropy", **changes), directory)
    assert ended.error == "TrainingDiverged" and 'alarms.non_finite = "warn"' in ended.message, ended.said
    assert "gradient norm is" in ended.message and "loss is" not in ended.message
    assert load_batch(directory, 0).tokens.teacher_logprobs_N.min() == -1e30 and nothing_left(directory)
    regardless = {**changes, "steps": 2, "alarms": {"non_finite": "warn"}, "evaluation": {"data": None}}
    assert run_case.train(write_run(models, tmp_path / "on", "entropy", **regardless), tmp_path / "on").code == 0
    before, after = (load_file(path / "model.safetensors") for path in (models / "student", tmp_path / "on/model"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_run_stopped_by_an_alarm_keeps_its_checkpoints_and_the_batch(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    alarms = {"entropy_collapse": "stop", "entropy_collapse_share": 1e9}  # rings as soon as there is a first entropy
    changes = {"checkpoint": {"every": 1}, "alarms": alarms}
    ended = run_case.train(write_run(models, directory, "entropy", **changes), directory)
    for stopped in (ended, run_case.resume(directory)):
        assert stopped.error == "TrainingDiverged", stopped.said
        assert 'alarms.entropy_collapse = "warn"' in stopped.message
        assert f"tropd inspect {directory} --step 1" in stopped.message
        assert loadable(directory) == [1] and not (directory / "model").exists()
    batch = load_batch(directory, 1)
    record = read_records(directory / "records.jsonl").steps[-1]
    assert record.step == 1 and record.tokens["student"] == len(batch.tokens)
    assert batch.tokens.teacher_logprobs_N.isfinite().all()


def test_weights_that_are_not_finite_are_never_saved(models: Path, tmp_path: Path) -> None:
    """An infinite row of the embedding that is no token's: every loss and gradient is finite."""
    directory, student = tmp_path / "run", tiny_model("qwen3", seed=0, vocab=VOCAB + 1)
    with torch.no_grad():
        student.model.embed_tokens.weight[VOCAB] = torch.inf
    save_model(tmp_path / "student", student)
    changes = {"student": {"path": str(tmp_path / "student")}, "checkpoint": {"every": 1}}
    ended = run_case.train(write_run(models, directory, **changes), directory)
    assert ended.error == "TrainingDiverged" and "is not finite after 1 steps" in ended.message, ended.said
    assert nothing_left(directory)


def test_a_batch_that_was_damaged_is_refused_in_words(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    changes = save_teacher(tmp_path, partial(fill, value=0.0))
    run_case.train(write_run(models, directory, **changes), directory)
    for name in ("rollouts.jsonl", "tokens.safetensors"):
        os.truncate(directory / "batches/step_000000" / name, 100)
        with pytest.raises(CheckpointError, match="damaged"):
            load_batch(directory, 0)
    with pytest.raises(ConfigError, match="Kept: 0"):
        load_batch(directory, 3)
