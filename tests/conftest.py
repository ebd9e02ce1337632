"""What every test starts from: one thread, no network, a tokenizer made on the spot."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Read by the libraries when they are imported, so they are set before any of them is.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TROPD_CACHE"] = tempfile.mkdtemp(prefix="tropd-cache-")

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.tiny import byte_tokenizer

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["TROPD_CACHE"], ignore_errors=True)

TESTS = Path(__file__).parent
FIRST_SECONDS = 120
"""Far above what the first command takes on a busy machine."""
LIMITS = {"slow": 1200, "server": 600}
"""Seconds that one test may take; the others have the limit in pyproject.toml."""
COMPAT = (
    "checkpoints/test_export.py",
    "cli/test_main.py",
    "config/test_run.py",
    "data/test_graders.py",
    "data/test_rows.py",
    "doctor/test_cost.py",
    "evaluation/test_runner.py",
    "integration/test_train.py",
    "model/test_forward.py",
    "model/test_hf.py",
    "model/test_kernels.py",
    "model/test_spans.py",
    "monitoring/test_trackers.py",
    "rollout/test_decoding.py",
    "run/test_resume.py",
    "servers/test_runs.py",
    "teachers/test_cached.py",
    "teachers/test_local.py",
    "test_version.py",
)
"""What other packages could break: train, kill, resume, evaluate, export, adapters, servers, kernels, every package."""


def pytest_sessionstart(session: pytest.Session) -> None:
    """If the first command of all fails, most tests would, some of them after minutes: it is told at once instead."""
    config = session.config
    if hasattr(config, "workerinput") or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    command = [sys.executable, "-m", "tests.first"]
    try:
        done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True, timeout=FIRST_SECONDS)
        reason = done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"it took more than {FIRST_SECONDS} seconds"
    if reason:
        pytest.exit(f"{reason.strip()[-3000:]}\n\n`python -m tests.first`, one training step, fails: see above.", 1)


@pytest.hookimpl(tryfirst=True)  # marks are made before pytest chooses by them
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.relative_to(TESTS).as_posix() in COMPAT and not item.get_closest_marker("slow"):
            item.add_marker("compat")
        for mark, seconds in LIMITS.items():
            if item.get_closest_marker(mark) and not item.get_closest_marker("timeout"):
                item.add_marker(pytest.mark.timeout(seconds))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Students, teachers and data sets on disk, which tests only read."""
    from tests.small_runs import write_models  # here, so that a broken package ends the session in its own way

    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def stopped(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped after step 5, with checkpoints of 2, 3 (the best), 4 and 5.  Copy it before touching it."""
    from tests import run_case
    from tests.small_runs import write_run
    from tropd.checkpoints.checkpoint import steps_kept

    directory = tmp_path_factory.mktemp("stopped") / "run"
    path = write_run(models, directory, checkpoint={"keep": 9})
    ended = run_case.train(path, directory, stop_after=5)
    assert ended.code == 0 and steps_kept(directory) == [2, 3, 4, 5], ended.said
    return directory


@pytest.fixture
def copied(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))
