"""What ends one process ends the run, soon, in words that are said once, with a checkpoint to go on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.distributed import launch
from tests.small_runs import write_run
from tropd.checkpoints import checkpoint as checkpoints

SOON = 120.0
"""Seconds, on a busy machine; the wait for the others would be half an hour."""


def wait_until(ready: Any, seconds: float = run_case.LIMIT_SECONDS) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.005)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(victim: int, models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, "ranks", steps=500, checkpoint={"every": 2, "keep": 2})
    ranks = launch.start(2, train=path, directory=directory)
    wait_until(lambda: run_case.num_recorded(directory) >= 3)
    ranks[victim].process.kill()
    killed = time.monotonic()
    other = ranks[1 - victim].wait()
    assert time.monotonic() - killed < SOON
    assert ranks[victim].wait().code == -signal.SIGKILL
    assert (other.code, other.error) == (1, "ProcessLost"), other.said
    assert f"tropd resume {directory}" in other.message
    newest = checkpoints.find(directory)
    assert newest is not None
    step = checkpoints.load(newest).step
    again = run_case.resume(directory, stop_after=step + 1)
    assert again.code == 0, again.said
    assert checkpoints.steps_kept(directory)[-1] == step + 1


def test_what_fails_on_one_process_is_told_by_that_one_alone(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, "ranks", teacher={"path": "teacher"})
    at_home, lost = partial(os.chdir, models), partial(os.chdir, tmp_path)  # one machine lacks the teacher
    first, second = (
        rank.wait() for rank in launch.start(2, train=path, directory=directory, prepare={0: at_home, 1: lost})
    )
    assert (second.code, second.error) == (1, "ConfigError") and "teacher" in second.message, second.said
    assert (first.code, first.error) == (1, "SystemExit"), first.said
    assert not (directory / "run.toml").exists(), "it has not begun"


def test_a_signal_to_one_process_stops_all_after_the_step(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, "ranks", steps=500, checkpoint={"every": 500})
    ranks = launch.start(2, train=path, directory=directory)
    wait_until(lambda: run_case.num_recorded(directory) >= 1)
    os.kill(ranks[1].process.pid, signal.SIGTERM)
    ended = [rank.wait() for rank in ranks]
    assert [e.code for e in ended] == [143, 143], ended
    assert checkpoints.steps_kept(directory) == [run_case.num_recorded(directory)]


@pytest.mark.slow
def test_torchrun_ends_when_a_process_is_killed_and_says_why_once(models: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory, "ranks", steps=500)
    process = torchrun("train", str(path))
    wait_until(lambda: run_case.num_recorded(directory) >= 2)
    os.kill(process_of_rank(1, process.pid), signal.SIGKILL)
    said = process.communicate(timeout=SOON)[0]
    assert process.returncode != 0
    assert said.count("error: a process of this run is gone") == 1, said
    assert said.count("Traceback") == 1, "torchrun's own, and none of ours"


@pytest.mark.slow
def test_what_all_processes_refuse_is_told_once(models: Path, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", "ranks", rollout={"num_prompts": 1})
    said = torchrun("train", str(path)).communicate(timeout=run_case.LIMIT_SECONDS)[0]
    assert said.count("error: 2 processes share 1 prompts") == 1, said


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-port",
        str(launch.free_port()),
    ]
    command = [*launcher, "-m", "tropd", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def process_of_rank(rank: int, parent: int) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    found = [pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(found[0])
