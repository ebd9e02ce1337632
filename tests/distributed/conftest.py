"""Models that runs of several processes read, and the same runs of one process to compare with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.distributed.launch import write_run
from tests.tiny import byte_tokenizer, tiny_model

Alone = Callable[..., Path]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = run_case.write_models(tmp_path_factory.mktemp("models"))
    run_case.save_model(tiny_model("llama", seed=0, tied=False), byte_tokenizer(), folder / "untied")
    return folder


@pytest.fixture(scope="session")
def alone(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """The folder of a run of one process, made once for each configuration."""
    made: dict[str, Path] = {}

    def run(**changes: Any) -> Path:
        name = json.dumps(changes)
        if name not in made:
            directory = tmp_path_factory.mktemp("alone") / "run"
            ended = run_case.train(write_run(models, directory, **changes), directory)
            assert ended.code == 0, ended.said
            made[name] = directory
        return made[name]

    return run
