"""Methods and policies whose teacher has a say in each token, from a run file to a killed and resumed run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests import run_case
from tests.kills import kill_at, recorded
from tests.small_runs import values_of
from tests.told import FEEDBACK, WORDS, write_world
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.monitoring.records import read_records
from tropd.run.start import resume, train
from tropd.training.assembly import load_parts

TRAP = {"window": 2, "streak": 2, "eta": 0.7, "exempt": 3, "entries": 4, "steps": 1}
CASES: dict[str, dict[str, Any]] = {
    "trb": {"method": {"name": "trb", "epsilon": {"shape": "linear", "start": 0.5, "end": 0.0, "until": 0.7}}},
    "skd": {"method": {"name": "skd"}},
    "kat": {"method": {"name": "kat", "trap": TRAP}},
    "kat online": {"method": {"name": "kat", "mode": "online", "trap": TRAP}},
    "kat extra": {"method": {"name": "tropd", "top_k": 8, "plus": [{"name": "kat", "trap": TRAP}]}},
    "mixed sampling": {"method": {"name": "minillm"}, "rollout": {"policy": {"name": "mixed_sampling"}}},
    "prefix and stop": {
        "method": {"name": "tropd", "top_k": 8},
        "rollout": {"plus": [{"name": "agreement_stop", "trap": TRAP}]},
    },
    "adapter": {
        "method": {"name": "skd"},
        "student": {"lora": {"rank": 4, "alpha": 8}},
        "teacher": {"path": "start", "briefing": {"kind": "column", "column": "solution"}},
    },
    "adapter that follows": {
        "method": {"name": "trb", "epsilon": {"shape": "constant", "start": 0.5}},
        "student": {"lora": {"rank": 4, "alpha": 8}},
        "teacher": {
            "path": "start",
            "follow": {"rule": "ema", "decay": 0.5},
            "briefing": {"kind": "column", "column": "solution"},
        },
    },
    "itself": {
        "method": {"name": "trb", "epsilon": {"shape": "constant", "start": 0.5}},
        "teacher": {"path": "student", "briefing": {"kind": "column", "column": "solution"}},
    },
    "several": {
        "method": {"name": "skd"},
        "teachers": {"even": {"path": "teacher"}, "odd": {"path": "copy"}},
        "data": {"teacher_column": "kind"},
    },
    "bfloat16": {"method": {"name": "skd"}, "student": {"dtype": "bfloat16"}},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), max_position_embeddings=2048)


def write_file(world: Path, directory: Path, case: dict[str, Any], **changes: Any) -> Path:
    import tomli_w

    values = values_of(world, "quick", **{"output": str(directory), **case, **changes})
    values["data"] = {**case.get("data", {}), "path": str(world / "told.jsonl")}
    for section in (values["teacher"], *values.get("teachers", {}).values()):
        if section["path"] in ("teacher", "copy"):
            section["path"] = str(world / section["path"])
    if "teachers" in case:
        values.pop("teacher")
    path = directory.with_name(directory.name + ".toml")
    path.write_text(tomli_w.dumps(values))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_run_file_is_enough(world: Path, tmp_path: Path, name: str) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", CASES[name])))
    records = read_records(directory / "records.jsonl").steps
    assert len(records) == 2
    assert all(math.isfinite(record.loss) and record.gradient_norm > 0 for record in records)
    rows = [
        row for part in sorted((directory / "rollouts").glob("*.parquet")) for row in pq.read_table(part).to_pylist()
    ]
    by_teacher = sum(a == "teacher" for row in rows for a in row["authors"])
    assert (by_teacher > 0) == (name in ("skd", "adapter", "several", "bfloat16", "kat extra", "prefix and stop"))


@pytest.mark.parametrize("name", ["trb", "kat", "kat online", "adapter that follows"])
def test_a_step_that_is_repeated_from_a_checkpoint_is_the_same_to_the_bit(
    world: Path, tmp_path: Path, name: str
) -> None:
    steps: dict[str, Any] = {"steps": 4, "checkpoint": {"every": 1, "keep": 9}}
    directory = train(Run.load(write_file(world, tmp_path / "run", CASES[name], **steps)))
    before = run_case.trace(directory)
    resume(directory, step=2)
    after = run_case.trace(directory)
    assert after["files"] == before["files"]
    assert [x["loss"] for x in after["records"][1:]] == [x["loss"] for x in before["records"][1:]]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_goes_on_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps: dict[str, Any] = {"steps": 5, "checkpoint": {"every": 1, "keep": 9}}
    ended = run_case.train(write_file(world, whole, CASES[name], **steps), whole)
    assert ended.code == 0, ended.said
    kill_at(write_file(world, killed, CASES[name], **steps), killed, [(recorded(1), 0.0), (recorded(3), 0.0)])
    assert run_case.trace(killed) == run_case.trace(whole)


def test_responses_end_early_once_the_queue_is_full(world: Path, tmp_path: Path) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", CASES["kat online"], steps=6)))
    records = read_records(directory / "records.jsonl").steps
    written = [record.tokens["student"] for record in records]
    assert min(written[2:]) < max(written[:1])


def test_a_blend_that_has_faded_costs_no_pass_of_the_teacher(world: Path, tmp_path: Path) -> None:
    fading = {"shape": "switch", "start": 0.5, "end": 0.0, "until": 0.5}
    run = Run.load(write_file(world, tmp_path / "run", {"method": {"name": "trb", "epsilon": fading}}))
    parts = load_parts(run, tmp_path)
    assert run.policy.decoding(0.4, parts.memory) is not None
    assert run.policy.decoding(0.5, parts.memory) is None and parts.pair is not None


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "served teacher": ({"teacher": {"servers": ["http://127.0.0.1:9"]}}, "but the teacher is on servers"),
    "served student": ({"rollout": {"servers": ["http://127.0.0.1:9"]}}, "but rollout.servers write as the student"),
    "own engine": ({"rollout": {"engine": "tests.run.test_own_parts:Mine"}}, "but a rollout.engine does"),
    "bridge": ({"teacher": {"path": "teacher", "bridge": {}}}, "but the teacher has a bridge"),
    "direction": (
        {"teacher": {"path": "teacher", "direction": {"file": "d.safetensors", "layer": 1}}},
        "but the teacher has a direction",
    ),
    "own teacher": ({"teacher": {"path": "examples/ensemble.py:Ensemble"}}, "but the teacher is one of your own"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_of_this_process_cannot_write_along(world: Path, tmp_path: Path, name: str) -> None:
    changes, says = REFUSED[name]
    path = write_file(world, tmp_path / "run", {**CASES["skd"], **changes})
    with pytest.raises(ConfigError, match=says):
        Run.load(path)


def test_a_teacher_that_is_told_of_responses_cannot_write_along(world: Path, tmp_path: Path) -> None:
    case = {**CASES["skd"], "teacher": {"path": "teacher", "briefing": FEEDBACK}, "grader": WORDS}
    with pytest.raises(ConfigError, match="lets the teacher write before there are any"):
        train(Run.load(write_file(world, tmp_path / "run", case)))


@pytest.mark.parametrize("name", ["skd", "kat online"])
def test_doctor_and_plan_know_the_policy(
    world: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_file(world, tmp_path / "run", CASES[name]))
    assert main(["doctor", path, "--json"]) == 0
    assert "error" not in {check["level"] for check in json.loads(capsys.readouterr().out)["checks"]}
    assert main(["plan", path]) == 0
