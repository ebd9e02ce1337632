"""What a checkpoint refuses to be taken for, and which ones stay."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import run_case
from tests.run_case import loadable
from tests.small_runs import save_model, write_run
from tests.tiny import tiny_model
from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.trained import load_checkpoint
from tropd.errors import CheckpointError, ConfigError
from tropd.run import start


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def foreign(path: Path, text: str) -> None:
    path.write_text(text)


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "weights cut short": ("weights.safetensors", cut),
    "a byte of the weights": ("weights.safetensors", partial(flip, position=-1)),
    "a byte of the moments": ("optimizer.safetensors", partial(flip, position=20_000)),
    "a byte of the configuration": ("run.toml", partial(flip, position=5)),
    "no optimiser": ("optimizer.safetensors", Path.unlink),
    "no state": ("state.json", Path.unlink),
    "half a state": ("state.json", cut),
    "state of a Trainer": ("state.json", partial(foreign, text='{"epoch": 1.0, "global_step": 5}')),
    "a list": ("state.json", partial(foreign, text="[1, 2]")),
    "a later schema": ("state.json", partial(foreign, text='{"kind": "tropd checkpoint", "schema": 99}')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_its_name_and_what_else_there_is(damage: str, copied: Path) -> None:
    name, spoil = DAMAGES[damage]
    newest = copied / "checkpoints" / "step_000005"
    spoil(newest / name)
    with pytest.raises(CheckpointError) as caught:
        start.resume(copied)
    assert str(newest) in str(caught.value) and "--step; there are: 2, 3, 4." in str(caught.value)


def test_any_flipped_bit_of_the_state_is_noticed(copied: Path) -> None:
    newest = copied / "checkpoints" / "step_000005"
    path = newest / "state.json"
    whole, noticed = path.read_bytes(), 0
    for position in random.Random(0).sample(range(len(whole)), 200):
        flip(path, position)
        try:
            checkpoints.load(newest)
            assert json.loads(path.read_bytes()) == json.loads(whole), "e or E in a number, or a digit beyond its bits"
        except CheckpointError:
            noticed += 1
        path.write_bytes(whole)
    assert noticed > 190
    assert checkpoints.load(newest).step == 5


def test_an_older_checkpoint_leads_to_the_same_end(models: Path, copied: Path, tmp_path: Path) -> None:
    (copied / "checkpoints/step_000005/state.json").unlink()
    ended = run_case.resume(copied, step=3, stop_after=4)
    assert ended.code == 0 and "back to step 3: dropped the checkpoints of 5, 4" in ended.said, ended.said
    assert loadable(copied) == [2, 3, 4] and run_case.num_recorded(copied) == 4
    assert run_case.resume(copied).code == 0
    straight = tmp_path / "straight"
    assert run_case.train(write_run(models, straight, checkpoint={"keep": 9}), straight).code == 0
    assert run_case.trace(copied) == run_case.trace(straight)


def test_a_step_without_checkpoint_and_a_folder_without_run_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 1 in .* There are: 2, 3, 4, 5"):
        start.resume(copied, step=1)
    with pytest.raises(ConfigError, match="no run.toml"):
        start.resume(tmp_path / "nothing")


def test_a_checkpoint_of_another_run_is_refused(models: Path, copied: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert run_case.train(write_run(models, other, seed=1), other, stop_after=2).code == 0
    shutil.rmtree(copied / "checkpoints")
    shutil.copytree(other / "checkpoints", copied / "checkpoints")
    with pytest.raises(CheckpointError, match="made by another run than"):
        start.resume(copied)


def test_a_changed_configuration_is_refused_instead_of_ignored(copied: Path) -> None:
    path = copied / "run.toml"
    path.write_text(path.read_text().replace("seed = 0", "seed = 1"))
    with pytest.raises(CheckpointError, match=r"run\.toml describes.*start a new one"):
        start.resume(copied)


def own_models(models: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(models, tmp_path / "own"))


def test_a_student_of_another_shape_is_refused(models: Path, tmp_path: Path) -> None:
    own, directory = own_models(models, tmp_path), tmp_path / "run"
    assert run_case.train(write_run(own, directory), directory, stop_after=2).code == 0
    save_model(own / "student", tiny_model("qwen3", tied=True, width=16))
    with pytest.raises(CheckpointError, match=r"has shape \(262, 32\), the student's has \(262, 16\).*another model"):
        load_checkpoint(directory, None, "cpu")
    with pytest.raises(CheckpointError, match=r"of the student, config\.json changed"):
        start.resume(directory)
    save_model(own / "student", tiny_model("qwen3", tied=True, layers=3))
    with pytest.raises(CheckpointError, match="they differ in 'model.layers.2.* It belongs to another model"):
        load_checkpoint(directory, None, "cpu")


@pytest.mark.parametrize(("case", "whose"), [("tropd", "teacher"), ("lora", "student")])
def test_weights_that_no_checkpoint_holds_must_be_the_same_on_resuming(
    case: str, whose: str, models: Path, tmp_path: Path
) -> None:
    own, directory = own_models(models, tmp_path), tmp_path / "run"
    assert run_case.train(write_run(own, directory, case), directory, stop_after=2).code == 0
    save_model(own / whose, tiny_model("qwen3", tied=True, seed=7))
    with pytest.raises(CheckpointError, match=f"of the {whose}, model.safetensors changed"):
        start.resume(directory)


def test_the_newest_and_the_best_checkpoints_stay(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    changes: dict[str, Any] = {"checkpoint": {"every": 2, "keep": 1}, "evaluation": {"every": 3}, "steps": 8}
    assert run_case.train(write_run(models, directory, **changes), directory).code == 0
    best = checkpoints.load(checkpoints.place_of(directory, 8)).state["best"]
    assert best["step"] == 3, "all score the same, so the first evaluation stays the best, at a step that is not saved"
    assert loadable(directory) == [3, 8]


def test_checkpoints_are_ordered_by_their_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000, 7):
        checkpoints.place_of(tmp_path, step).mkdir(parents=True)
    (tmp_path / "checkpoints/step_000008.tmp").mkdir()
    (tmp_path / "checkpoints/step_000009.bak").mkdir()
    assert checkpoints.steps_kept(tmp_path) == [7, 999_999, 1_000_000]
    assert checkpoints.find(tmp_path) == checkpoints.place_of(tmp_path, 1_000_000)


def test_all_files_of_a_checkpoint_have_the_mode_of_the_users_other_files(tmp_path: Path) -> None:
    (tmp_path / "own").write_text("x")
    saved = checkpoints.save(
        tmp_path, 1, weights={"w": torch.ones(2)}, optimizer={"m": torch.ones(2)}, run="steps = 1\n", state={}
    )
    modes = {path.name: oct(path.stat().st_mode) for path in saved.iterdir()}
    assert len(modes) == 4 and set(modes.values()) == {oct((tmp_path / "own").stat().st_mode)}
