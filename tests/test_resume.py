"""A run that is stopped, killed or continued ends exactly like one that was left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import run_case
from tests.run_case import CASES


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_case.write_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_and_resumed_is_the_run_left_alone_bit_for_bit(case: str, models: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    ended = run_case.train(run_case.write_run(models, straight, case), straight)
    assert ended.code == 0, ended.said
    ended = run_case.train(run_case.write_run(models, resumed, case), resumed, stop_after=1)
    assert ended.code == 0, ended.said
    for stop in (2, 3, 4, 5, None):
        ended = run_case.resume(resumed, stop_after=stop)
        assert ended.code == 0, ended.said
    assert run_case.trace(resumed) == run_case.trace(straight)
