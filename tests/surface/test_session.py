"""What is broken for every test is told once, at once, and no test goes on for ever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import COMPAT, TESTS

ROOT = Path(__file__).parents[2]


def test_a_session_whose_first_command_fails_ends_before_its_first_test(tmp_path: Path) -> None:
    (tmp_path / "tyro.py").write_text("raise ImportError('this tyro is broken')")
    paths = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    command = [sys.executable, "-m", "pytest", "-n", "2", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **paths}, capture_output=True, text=True, timeout=110)
    said = done.stdout + done.stderr
    assert done.returncode == 1
    assert "this tyro is broken" in said and "`python -m tests.first`, one training step, fails" in said
    assert " passed" not in said and "workers" not in said


def test_every_test_has_a_limit(request: pytest.FixtureRequest) -> None:
    assert 0 < float(request.config.getini("timeout")) <= 120


def test_every_file_that_is_marked_compat_exists() -> None:
    assert [name for name in COMPAT if not (TESTS / name).is_file()] == []
