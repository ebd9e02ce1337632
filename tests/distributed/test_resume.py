"""A run goes on on another number of processes, whoever wrote its checkpoint."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import run_case
from tests.distributed import launch
from tests.distributed.conftest import Alone
from tests.distributed.launch import distance, weights_of
from tests.distributed.test_same import TOLERANCE, assert_same_run
from tests.small_runs import write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main

HALF = {"student": {"dtype": "bfloat16"}, "teacher": {"dtype": "bfloat16"}, "alarms": {"mismatch": "warn"}}


def go_on(directory: Path, sizes: list[int], train: Path, **how: Any) -> None:
    """Each number of processes makes one step, the last one the rest."""
    for n, size in enumerate(sizes):
        stop = n + 1 if n + 1 < len(sizes) else None
        launch.run(size, train=train if n == 0 else None, directory=directory, stop_after=stop, **how)
        assert stop is None or checkpoints.steps_kept(directory)[-1] == stop


def test_two_then_four_then_one_process_train_the_student_of_one(models: Path, alone: Alone, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    go_on(directory, [2, 4, 1], write_run(models, directory, "ranks"))
    layouts = [
        sorted(p.name[:11] for p in folder.glob("*.safetensors"))
        for folder in sorted((directory / "checkpoints").iterdir())
    ]
    assert [len(files) for files in layouts] == [2, 4, 2] and layouts[2] == ["optimizer.s", "weights.saf"]
    assert_same_run(alone(), directory)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [[1, 2, 1], [1, 4, 2]])
@pytest.mark.parametrize("method", ["tropd", "tip"])
def test_a_checkpoint_of_one_process_goes_on_on_several(
    sizes: list[int], method: str, models: Path, alone: Alone, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    go_on(directory, sizes, write_run(models, directory, "ranks", method={"name": method}))
    assert distance(alone(method={"name": method}), directory) < TOLERANCE


@pytest.mark.slow
def test_half_precision_keeps_its_masters_from_one_number_of_processes_to_another(models: Path, tmp_path: Path) -> None:
    """The shards hold what one process would: bfloat16 weights, float32 masters, float32 moments."""
    directory = tmp_path / "run"
    go_on(directory, [2, 1, 2], write_run(models, directory, "ranks", **HALF))
    saved = [checkpoints.load(checkpoints.place_of(directory, step)) for step in (1, 2, 3)]
    for one, other in itertools.pairwise(saved):
        assert one.weights.keys() == other.weights.keys() and one.optimizer.keys() == other.optimizer.keys()
        assert {x.dtype for x in one.weights.values()} == {torch.bfloat16}
        moved = 0
        for name, x in one.weights.items():
            master = one.optimizer[f"master.{name}"]
            assert master.dtype == torch.float32 and torch.equal(master.to(torch.bfloat16), x)
            moved += not torch.equal(master, other.optimizer[f"master.{name}"])
        assert moved > len(one.weights) // 2
    assert {x.dtype for x in weights_of(directory).values()} == {torch.bfloat16}


def test_a_sharded_checkpoint_is_exported_by_one_process(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    launch.run(2, train=write_run(models, directory, "ranks", steps=1), directory=directory)
    assert main(["export", str(directory), "--step", "1", "-o", str(tmp_path / "model")]) == 0
    exported, own = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", directory / "model"))
    assert exported.keys() == own.keys() and all(torch.equal(x, own[name]) for name, x in exported.items())
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]


def test_a_damaged_shard_is_refused_in_words(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    launch.run(2, train=write_run(models, directory, "ranks", steps=2), directory=directory)
    shard = next((directory / "checkpoints" / "step_000002").glob("shard-00002*"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    ended = run_case.resume(directory)
    assert (ended.error, "is damaged" in ended.message) == ("CheckpointError", True), ended.said
    assert "there are: 1" in ended.message
