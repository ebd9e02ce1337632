"""A folder for weights that is not the run's: each run has its own in it, and leaves nothing there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.servers.mini import MiniServer, load
from tests.small_runs import run_of, write_models
from tropd.config.run import Run
from tropd.errors import ConfigError, EngineError
from tropd.run.start import train

OPD = {"name": "opd"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


class Watching(MiniServer):
    """Remembers what lay where it was told to read."""

    def __init__(self, folder: Path, **how: Any) -> None:
        super().__init__(folder, **how)
        self.read: dict[Path, set[str]] = {}

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        self.look(body["kwargs"]["weights_path"])
        return super().reload(body)

    def load_adapter(self, name: str, folder: str) -> dict[str, Any]:
        self.look(folder)
        return super().load_adapter(name, folder)

    def look(self, folder: str) -> None:
        self.read[Path(folder)] = {path.name for path in Path(folder).iterdir()}


def run_on(world: Path, output: Path, server: MiniServer, memory: Path, **changes: Any) -> Run:
    rollout = {"servers": [server.url], "weights_folder": str(memory), **changes.pop("rollout", {})}
    return run_of(world, OPD, output=str(output), rollout=rollout, **changes)


def test_every_run_has_a_folder_of_its_own_there_and_removes_it(world: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    runs = [tmp_path / "run", tmp_path / "elsewhere" / "run"]
    with Watching(world / "student") as server:
        for output in runs:
            train(run_on(world, output, server, memory, steps=1))
            assert not (output / "rollout_weights").exists() and list(memory.iterdir()) == []
        train(run_on(world, tmp_path / "lora", server, memory, steps=1, student={"lora": {"rank": 2}}))
        assert list(memory.iterdir()) == []
    first, second, third = server.read
    assert {first.parent, second.parent, third.parent} == {memory} and first != second
    assert [place.name.rpartition("-")[0] for place in (first, second, third)] == [
        "tropd-run",
        "tropd-run",
        "tropd-lora",
    ]
    assert "model.safetensors" in server.read[first] and "adapter_model.safetensors" in server.read[third]


def test_it_is_removed_too_where_a_run_fails_before_its_first_step(world: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    with Watching(world / "student", ignores_reload=True) as server:
        server.model, _ = load(world / "teacher")
        held_out = {"data": {"path": str(world / "data.jsonl")}, "num_samples": 1, "max_new_tokens": 4}
        with pytest.raises(EngineError, match=r"memory/tropd-run-\w{8}, until this run ends"):
            train(run_on(world, tmp_path / "run", server, memory, steps=1, evaluation=held_out))
    assert len(server.read) == 1 and list(memory.iterdir()) == []


def test_a_folder_for_nobody_is_refused(world: Path) -> None:
    with pytest.raises(ConfigError, match=r"weights_folder is \"/dev/shm\".*rollout.servers is empty"):
        run_of(world, rollout={"weights_folder": "/dev/shm"})
