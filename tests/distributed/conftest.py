"""Models that runs of several processes read, and the same runs of one process to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.small_runs import save_model, write_models, write_run

Alone = Callable[..., Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    save_model(folder / "untied", family="llama", tied=False)
    return folder


@pytest.fixture(scope="session")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folder of a run of one process, made once for each configuration."""
    made: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        name = json.dumps(changes)
        if name not in made:
            directory = tmp_path_factory.mktemp("alone") / "run"
            ended = run_case.train(write_run(models, directory, "ranks", **changes), directory)
            assert ended.code == 0, ended.said
            made[name] = directory
        return made[name]

    return run
