from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.report.examples import step_record
from tests.report.folders import write_folder
from tropd.errors import ConfigError
from tropd.monitoring.records import RecordWriter
from tropd.report.history import read_history
from tropd.report.runs import names_of, read_runs

BEFORE, AFTER = [[0.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 1.0]]


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "run", before=BEFORE, after=AFTER, saved=[0, 4], alarms={3: "mismatch: step 3: no"}
    )
    run = read_history(folder)
    assert run.problems == [] and run.finished and run.steps == list(range(6))
    assert run.column("share/trusted").tolist() == [0.6] * 6
    assert run.column("probe/reward/mean")[-1] == 1.0
    assert sorted(run.evaluations) == sorted(run.scores) == [0, 6]
    assert run.evaluations[0]["avg@2"] == 0.25 and run.evaluations[6]["avg@2"] == 0.75
    assert run.alarms == [(3, "mismatch", "step 3: no")]
    assert sorted(run.rollouts) == [0, 4]
    assert run.config["method.name"] == "tropd"


def test_a_refreshed_history_is_the_one_that_is_read_at_once(tmp_path: Path) -> None:
    """Cut anywhere, also inside a line: what is read in two parts is what is read in one."""
    folder = write_folder(tmp_path / "run", before=BEFORE, after=AFTER, alarms={2: "a: b"})
    path = folder / "records.jsonl"
    whole, content = read_history(folder), path.read_bytes()
    for cut in range(0, len(content), 97):
        path.unlink()
        path.write_bytes(content[:cut])
        run = read_history(folder)
        with path.open("ab") as file:
            file.write(content[cut:])
        run.refresh()
        assert (run.steps, run.values, run.evaluations, run.alarms, run.problems) == (
            whole.steps,
            whole.values,
            whole.evaluations,
            whole.alarms,
            [],
        ), cut


def test_nothing_is_read_again_while_nothing_is_new(tmp_path: Path) -> None:
    run = read_history(write_folder(tmp_path / "run"))
    assert run.refresh() is False


def test_a_run_that_went_back_is_read_from_the_start(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run", steps=6)
    run = read_history(folder)
    with RecordWriter.resume(folder / "records.jsonl", step=2) as writer:
        writer.write(step_record(2, loss=9.0))
    assert run.refresh() is True
    assert run.steps == [0, 1, 2] and run.column("loss")[2] == 9.0


def test_broken_records_are_named_and_the_rest_is_kept(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run", steps=6)
    path = folder / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[2], "{broken\n", *lines[5:], lines[6][:40]]))
    run = read_history(folder)
    assert run.steps == [1, 4, 5]
    assert [problem.split(": ", 1)[1] for problem in run.problems[:3]] == [
        "step 0 is missing",
        "not a JSON object; left out",
        "steps 2 to 3 are missing",
    ]
    assert "torn" in run.problems[3]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\n\n", b"[]\n[]\n"])
def test_records_that_are_none_leave_a_history_without_steps(tmp_path: Path, content: bytes) -> None:
    folder = write_folder(tmp_path / "run")
    (folder / "records.jsonl").write_bytes(content)
    run = read_history(folder)
    assert run.steps == [] and run.problems


def test_a_broken_header_does_not_take_the_steps_with_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run", steps=3)
    path = folder / "records.jsonl"
    path.write_bytes(b"xx" + path.read_bytes()[20:])
    run = read_history(folder)
    assert run.steps == [0, 1, 2] and "no header" in run.problems[0]


def test_records_of_another_schema_are_not_guessed_at(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run", steps=3)
    path = folder / "records.jsonl"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 2', 1))
    run = read_history(folder)
    assert run.steps == [] and "schema 2" in run.problems[0]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "run", before=BEFORE, after=AFTER)
    (folder / "run.toml").write_text("steps = = 3")
    (folder / "evaluations" / "step_000006.json").write_text('{"schema": 1, "step": 6, "prompts": {"a": {}}}')
    run = read_history(folder)
    assert [("run.toml" in p, "step_000006.json" in p) for p in run.problems] == [(True, False), (False, True)]
    assert sorted(run.scores) == [0] and run.planned_steps is None and not run.finished


def test_a_column_that_comes_late_is_unknown_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.jsonl"
    with RecordWriter(path, {}) as writer:
        writer.write(step_record(0, probes={"a": 1.0}))
        writer.write(step_record(1, probes={"b": math.inf}))
        writer.write(step_record(2, probes={"a": 3.0}))
    run = read_history(path.parent)
    assert json.dumps(run.column("probe/a").tolist()) == "[1.0, NaN, 3.0]"
    assert json.dumps(run.column("probe/b").tolist()) == "[NaN, Infinity, NaN]"


def test_runs_are_called_by_what_tells_them_apart() -> None:
    assert names_of([Path("/r/lab_opd_0"), Path("/r/lab_opd_1"), Path("/r/lab_jsd_0")]) == ["opd_0", "opd_1", "jsd_0"]
    assert names_of([Path("/r/a/run"), Path("/r/b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("/r/lab_opd")]) == ["lab_opd"]
    with pytest.raises(ConfigError, match="named twice"):
        names_of([Path("/r/a"), Path("/r/b/../a")])


def test_a_folder_that_is_no_run_is_refused_with_the_runs_inside(tmp_path: Path) -> None:
    write_folder(tmp_path / "lab" / "opd")
    with pytest.raises(ConfigError, match="Runs inside it: opd"):
        read_runs([tmp_path / "lab"])
    with pytest.raises(ConfigError, match="there is no folder"):
        read_runs([tmp_path / "nowhere"])
