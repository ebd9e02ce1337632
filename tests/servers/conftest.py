"""One tiny model on disk for all tests of servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import save_model
from tests.tiny import tiny_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "teacher", tiny_model(seed=1, sharp=4.0))


@pytest.fixture(scope="session")
def other_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("served") / "other", tiny_model(seed=9, sharp=4.0))
