"""A run that is stopped, killed or continued ends exactly like one that was left alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import kills, run_case
from tests.kills import LONG, kill_at, random_moments, recorded
from tests.run_case import Order
from tests.small_runs import CASES, TAKES, write_run
from tropd.checkpoints import checkpoint as checkpoints

Straight = Callable[..., Path]


@pytest.fixture(scope="session")
def straight(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Straight:
    """The folder of a run that was left alone, made once for each configuration."""
    made: dict[str, Path] = {}

    def run(case: str = "tropd", **changes: Any) -> Path:
        name = f"{case} {changes}"
        if name not in made:
            directory = tmp_path_factory.mktemp("straight") / "run"
            ended = run_case.train(write_run(models, directory, case, **changes), directory)
            assert ended.code == 0, ended.said
            made[name] = directory
        return made[name]

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_and_resumed_is_the_run_left_alone_bit_for_bit(
    case: str, models: Path, straight: Straight, tmp_path: Path
) -> None:
    resumed = tmp_path / "resumed"
    stops = (1, 3, 4, None) if case == "tropd" else (2, 5, None)
    ended = run_case.train(write_run(models, resumed, case), resumed, stop_after=stops[0])
    assert ended.code == 0, ended.said
    took: set[str] = set()
    for stop in stops[1:]:
        ended = run_case.resume(resumed, stop_after=stop)
        assert ended.code == 0, ended.said
        took |= ended.took
    trace = run_case.trace(resumed)
    assert trace == run_case.trace(straight(case))
    assert len(trace["records"]) == 1 + 6 and trace["files"]
    assert took >= TAKES[case], "what was not taken was not compared"


def test_the_weights_move_in_every_case_so_that_equality_means_something(models: Path, straight: Straight) -> None:
    directory = straight()
    before, after = (load_file(folder / "model.safetensors") for folder in (models / "student", directory / "model"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)
    texts = run_case.trace(directory)["texts"]
    assert [number for number, *_ in texts] == [1, 2, 3, 4], (
        "four prompts, each asked once although the run goes round more than four times"
    )


def test_a_resume_in_a_new_interpreter_is_exact_too(models: Path, straight: Straight, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    path = write_run(models, directory)
    code = (
        "import sys, torch; from pathlib import Path; torch.set_num_threads(1)\n"
        "from tropd.config.run import Run; from tropd.run.start import resume\n"
        "resume(Path(sys.argv[1]))"
    )
    ended = run_case.train(path, directory, stop_after=3)
    assert ended.code == 0, ended.said
    subprocess.run([sys.executable, "-c", code, str(directory)], check=True, capture_output=True)
    assert run_case.trace(directory) == run_case.trace(straight())


def saving(directory: Path) -> bool:
    return any((directory / "checkpoints").glob("*.tmp"))


def writing_texts(directory: Path) -> bool:
    return recorded(1)(directory) and (directory / "teacher_texts.sqlite-journal").exists()


def exporting(directory: Path) -> bool:
    return (directory / "model.tmp").exists()


def test_a_run_killed_at_random_moments_ends_like_one_left_alone(
    models: Path, straight: Straight, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    left = kill_at(write_run(models, killed, **LONG), killed, random_moments(0, 4, 12))
    assert len(left) == 4
    assert run_case.trace(killed) == run_case.trace(straight(**LONG))


@pytest.mark.slow
def test_runs_of_every_case_survive_kills_at_random_moments(tmp_path: Path) -> None:
    """A sample: `python -m tests.kills 200` kills as often as you like."""
    counts = list(kills.of_every_case(tmp_path, num_kills=60, seed=1))
    assert sum(count.kills for count in counts) >= 60
    assert [count for count in counts if count.differ] == []


@pytest.mark.parametrize(
    ("during", "unfinished"),
    [(saving, "step_"), (writing_texts, "teacher_texts.sqlite-journal"), (exporting, "model.tmp")],
)
def test_a_run_killed_while_it_writes_ends_like_one_left_alone(
    during: Callable[[Path], bool], unfinished: str, models: Path, straight: Straight, tmp_path: Path
) -> None:
    changes = {**LONG, "data": {"path": str(models / "many.jsonl")}, "checkpoint": {"every": 1}}
    for attempt in range(5):  # seen from outside, the moment may be over before the kill arrives
        killed = tmp_path / f"killed_{attempt}"
        left = kill_at(write_run(models, killed, **changes), killed, [(during, 0.0)])
        if any(unfinished in names for names in left):
            break
    else:
        pytest.fail(f"no kill came while {unfinished} was there")
    assert run_case.trace(killed) == run_case.trace(straight(**changes))


def test_a_run_killed_before_its_first_checkpoint_starts_over(models: Path, straight: Straight, tmp_path: Path) -> None:
    killed, changes = tmp_path / "killed", {"checkpoint": {"every": 6}, "evaluation": {"every": 6}}
    path = write_run(models, killed, **changes)
    assert run_case.start(Order(train=path, directory=killed)).kill_when(lambda: recorded(2)(killed))
    assert not checkpoints.steps_kept(killed) and run_case.num_recorded(killed) >= 2
    again = run_case.train(path, killed)
    assert again.error == "ConfigError" and f"tropd resume {killed}" in again.message, "train does not overwrite a run"
    assert run_case.resume(killed).code == 0
    assert run_case.trace(killed) == run_case.trace(straight(**changes))
