"""Two processes move a teacher that follows the student as one process does, sharded or whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed import launch
from tests.distributed.conftest import Alone
from tests.distributed.test_same import TOLERANCE, assert_same_run
from tests.small_runs import write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.monitoring.records import read_records

EMA = {"rule": "ema", "decay": 0.5}
GATED = {"rule": "gated", "min_steps": 2, "rise": 0.0, "tail": 9.0, "clipped": 1.0}
RARE = pytest.mark.slow
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "student sharded, teacher whole": ({}, {}),
    "both sharded": ({"teacher": "sharded"}, {}),
    "student whole, teacher sharded": ({"student": "replicated", "teacher": "sharded"}, {}),
    "adapter": ({}, {"student": {"lora": {"rank": 4, "alpha": 8}}}),
}


def changes_of(rule: dict[str, Any], **changes: Any) -> dict[str, Any]:
    told = {"kind": "column", "column": "answer", "template": "{prompt} ({value})"}
    return {"teacher": {"path": "start", "briefing": told, "follow": rule}, "method": {"name": "jsd"}, **changes}


def assert_same_teacher(one: Path, other: Path, step: int = 3) -> None:
    mine, theirs = (checkpoints.load(checkpoints.place_of(folder, step)).teachers for folder in (one, other))
    assert mine.keys() == theirs.keys() and mine
    assert max(float((x - theirs[name]).norm() / x.norm()) for name, x in mine.items()) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", [EMA, pytest.param(GATED, marks=RARE)], ids=["ema", "gated"])
def test_two_processes_move_the_teacher_of_one(
    rule: dict[str, Any], layout: str, models: Path, alone: Alone, tmp_path: Path
) -> None:
    parallel, student = LAYOUTS[layout]
    changes, directory = changes_of(rule, **student), tmp_path / "run"
    launch.run(2, train=write_run(models, directory, "ranks", parallel=parallel, **changes), directory=directory)
    assert_same_run(alone(**changes), directory)
    assert_same_teacher(alone(**changes), directory)
    assert any(r.probes["teacher/mean_logprob"] for r in read_records(directory / "records.jsonl").steps)


def test_the_teacher_goes_on_on_another_number_of_processes(models: Path, alone: Alone, tmp_path: Path) -> None:
    """Killed inside the gate on two processes, and once more on one: it opens when it would have opened."""
    changes, directory = changes_of(GATED), tmp_path / "run"
    path = write_run(models, directory, "ranks", parallel={"teacher": "sharded"}, **changes)
    launch.run(2, train=path, directory=directory, stop_after=1)
    launch.run(1, directory=directory, stop_after=2)
    launch.run(2, directory=directory)
    assert_same_run(alone(**changes), directory)
    for step in (1, 2, 3):
        assert_same_teacher(alone(**changes), directory, step)


def test_all_processes_decide_by_the_answers_of_all(models: Path, alone: Alone, tmp_path: Path) -> None:
    """By its own answers each process would have another average, and so the numbers of the gate would differ."""
    (models / "by_length.py").write_text(
        "def grade(prompts, completions, **columns):\n    return [len(text) % 7 / 7 for text in completions]\n"
    )
    changes = {"grader": f"{models / 'by_length.py'}:grade", **changes_of({**GATED, "min_steps": 1})}
    directory = tmp_path / "run"
    launch.run(2, train=write_run(models, directory, "ranks", **changes), directory=directory)
    steps, expected = (read_records(folder / "records.jsonl").steps for folder in (directory, alone(**changes)))
    for one, other in zip(steps, expected, strict=True):
        for name in ("age", "steps", "reward", "reward_at_copy", "tail_at_copy"):
            assert one.probes[f"follow/{name}"] == pytest.approx(other.probes[f"follow/{name}"])
        assert one.probes["reward/mean"] > 0
    assert_same_teacher(alone(**changes), directory)
    assert len({record.probes["follow/reward"] for record in steps}) == 3
