"""A run whose teacher is told more than the student is killed and goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.kills import kill_at, recorded
from tests.small_runs import write_run
from tests.told import COLUMN, FEEDBACK, PEERS, SHOWN, WORDS, write_world
from tropd.monitoring.records import read_records

CASES: dict[str, dict[str, Any]] = {
    "another model, prefixes": {"teacher": {"briefing": COLUMN}},
    "the student before": {"teacher": {"path": "start", "briefing": COLUMN}, "method": {"name": "opsd"}},
    "the student now": {"teacher": {"path": "student", "briefing": COLUMN}, "method": {"name": "jsd"}},
    "the base": {
        "student": {"lora": {"rank": 4, "alpha": 8}},
        "teacher": {"path": "start", "briefing": COLUMN},
        "method": {"name": "opd"},
    },
    "the grader's words": {"teacher": {"briefing": FEEDBACK}, "grader": WORDS, "method": {"name": "opd"}},
    "peers": {
        "teacher": {"path": "start", "briefing": PEERS},
        "grader": WORDS,
        "method": {"name": "opsd"},
        "rollout": {"num_rollouts": 3, "save_every": 1},
    },
    "examples": {"teacher": {"briefing": {**SHOWN, "pick": "random"}}, "method": {"name": "opd"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(("case", "streaming"), [*((case, False) for case in CASES), ("the base", True)])
def test_a_told_run_that_is_killed_goes_on_bit_for_bit(world: Path, tmp_path: Path, case: str, streaming: bool) -> None:
    data = {"path": str(world / "told.jsonl"), "streaming": streaming}
    each = {"steps": 4, "data": data, "rollout": {"save_every": 1}, "checkpoint": {"every": 1}}
    changes = {**each, **CASES[case]}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run_case.train(write_run(world, whole, "quick", **changes), whole)
    assert ended.code == 0, ended.said
    kill_at(write_run(world, killed, "quick", **changes), killed, [(recorded(2), 0.0)])
    assert run_case.trace(killed) == run_case.trace(whole)
    steps = read_records(whole / "records.jsonl").steps
    assert any(record.loss for record in steps) and all(0 <= record.probes["unread/teacher"] < 1 for record in steps)
