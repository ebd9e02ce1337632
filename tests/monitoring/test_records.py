from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.examples import step_record
from tropd.errors import CheckpointError, ConfigError, require
from tropd.monitoring.records import RecordWriter, find_step, read_records


def write_run(path: Path, steps: int) -> None:
    with RecordWriter(path, {"method": "tropd"}) as writer:
        for step in range(steps):
            writer.write(step_record(step))


def refuse_constant(name: str) -> float:
    raise AssertionError(f"{name} is not JSON")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "run" / "records.jsonl"
    records = [step_record(0), step_record(1, evaluation={"gsm8k@1": 0.5}, alarms=("mismatch: why, and what to do",))]
    with RecordWriter(path, {"method": "tropd", "data": Path("a/b")}) as writer:
        for record in records:
            writer.write(record)
    read = read_records(path)
    assert read.steps == records
    assert read.header == {"schema": 1, "kind": "header", "method": "tropd", "data": "a/b"}
    assert read.problems == []


def test_a_line_can_be_read_as_soon_as_write_returns(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "records.jsonl")
    writer.write(step_record(0))
    assert [record.step for record in read_records(writer.path).steps] == [0]
    writer.close()


def test_numbers_that_json_cannot_say_come_back_and_every_line_is_json(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path, {"clip": (math.inf, 1.0)}) as writer:
        writer.write(step_record(0, loss=math.nan, probes={"ratio/min": -math.inf, "a~b": math.inf, "fine": 2.0}))
    lines = [json.loads(line, parse_constant=refuse_constant) for line in path.read_text().splitlines()]
    assert lines[1]["loss"] is None
    assert lines[1]["nonfinite"] == {"/loss": "nan", "/probes/ratio~1min": "-inf", "/probes/a~0b": "inf"}
    read = read_records(path)
    assert read.header["clip"] == [math.inf, 1.0]
    assert math.isnan(read.steps[0].loss)
    assert read.steps[0].probes == {"ratio/min": -math.inf, "a~b": math.inf, "fine": 2.0}
    assert read.problems == []


def test_records_of_another_run_are_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_run(path, 2)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="resume"):
        RecordWriter(path)
    assert path.read_bytes() == before


def test_a_step_cannot_be_written_twice(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "records.jsonl") as writer:
        writer.write(step_record(3))
        with pytest.raises(AssertionError, match="step 3 after 3"):
            writer.write(step_record(3))


def test_a_resumed_run_has_the_bytes_of_an_unbroken_one(tmp_path: Path) -> None:
    unbroken, broken = tmp_path / "unbroken.jsonl", tmp_path / "broken.jsonl"
    write_run(unbroken, 6)
    write_run(broken, 5)
    with broken.open("ab") as file:
        file.write(b'{"kind": "step", "step": 5, "lo')
    with RecordWriter.resume(broken, step=3) as writer:
        for step in range(3, 6):
            writer.write(step_record(step))
    assert broken.read_bytes() == unbroken.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken.jsonl", "unbroken.jsonl"]


def test_resume_at_the_end_drops_only_the_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_run(path, 3)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "st')
    RecordWriter.resume(path, step=3).close()
    assert path.read_bytes() == whole


def test_a_resumed_writer_knows_its_last_step(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_run(path, 5)
    with RecordWriter.resume(path, step=3) as writer, pytest.raises(AssertionError, match="step 2 after 2"):
        writer.write(step_record(2))


def test_resume_without_records_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="do not exist"):
        RecordWriter.resume(tmp_path / "records.jsonl", step=3)


def test_reading_names_every_line_that_it_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_run(path, 2)
    step = json.loads(path.read_text().splitlines()[1])
    odd = [
        {"kind": "weather"},
        {**step, "step": 1},
        {**step, "step": 4, "colour": "red"},
        {**step, "step": 5, "loss": "big"},
        {**step, "step": 6, "nonfinite": {"/probes/none/there": "nan"}},
        ["a list"],
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in odd)
        file.write('{"kind": "step", "step": 7')
    read = read_records(path)
    assert [record.step for record in read.steps] == [0, 1, 4]
    assert [problem.split(":")[0] for problem in read.problems] == [f"line {n}" for n in (4, 5, 6, 6, 7, 8, 9, 10)]
    for number, said in ((0, "weather"), (1, "after step 1"), (2, "colour"), (3, "2 to 3 are missing"), (4, "loss")):
        assert said in read.problems[number]
    assert "torn" in read.problems[-1]


def test_another_schema_is_refused_in_words(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"schema": 7, "kind": "header"}\n')
    with pytest.raises(ConfigError, match=r"schema 7, and this tropd reads schema 1.*upgrade"):
        read_records(path)


@pytest.mark.parametrize("content", ["", "{", '{"kind": "step"}\n', "[]\n"])
def test_a_file_that_is_no_record_of_a_run_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="no header"):
        read_records(path)


def test_a_missing_package_is_refused_with_the_line_that_installs_it() -> None:
    with pytest.raises(ConfigError, match=r"saving rollouts was asked for.*pip install 'tropd\[data\]'"):
        require("a_package_that_nobody_has", "data", "saving rollouts")


def test_one_record_is_found_without_reading_the_others(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path, {}) as writer:
        for step in range(0, 300, 2):
            writer.write(step_record(step, loss=float(step) if step % 3 else float("nan")))
    known = {record.step: record for record in read_records(path).steps}
    for chunk in (200, 257, 2**22):
        for step in (0, 2, 4, 150, 298, 1, 299, -2, 10**30):
            found = find_step(path, step, chunk=chunk)
            assert repr(found) == repr(known.get(step))


def test_a_record_of_another_writer_is_found_as_well(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with RecordWriter(path, {}) as writer:
        writer.write(step_record(0))
    header, line = path.read_text().splitlines()
    values = json.loads(line)
    odd = [json.dumps({**{k: v for k, v in values.items() if k != "step"}, "step": step}) for step in (0, 1)]
    path.write_text("\n".join([header, *odd]) + "\n")
    assert (found := find_step(path, 1)) is not None and found.step == 1


def test_records_are_read_without_torch() -> None:
    """It would take more memory than the records of a long run."""
    code = (
        "import sys, tropd.report.page, tropd.report.verdict, tropd.report.transcripts; print('torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
