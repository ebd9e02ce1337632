"""Policies that say how far and what is written again, in whole runs: what they record, and that they go on exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from pyarrow import parquet

from tests import run_case
from tests.kills import kill_at, recorded
from tests.servers.mini import MiniServer
from tests.small_runs import NEW_TOKENS, merged, run_of, values_of, write_models
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.monitoring.records import read_records
from tropd.planning import DEVICES, make_forecast
from tropd.run.start import resume, train
from tropd.training.assembly import load_parts
from tropd.types import StepRecord

PLUS: dict[str, dict[str, Any]] = {
    "horizon": {"rollout": {"plus": [{"name": "horizon", "tokens": 9}]}},
    "growing": {
        "rollout": {"plus": [{"name": "horizon", "share": {"shape": "linear", "start": 0.2, "end": 1.0, "until": 0.5}}]}
    },
    "esr": {"method": {"name": "esr", "tokens": 9}},
    "replay": {"rollout": {"num_prompts": 4, "policy": {"name": "replay", "share": 0.5}}, "method": {"name": "opd"}},
    "tropd and replay": {"rollout": {"plus": [{"name": "replay", "share": 0.4, "max_age": 3}]}},
    "phased": {
        "rollout": {"policy": {"name": "phased", "share": {"shape": "linear", "start": 1.0, "end": 0.0}}},
        "grader": f"{__name__}:begins_early",
        "method": {"name": "opd", "plus": [{"name": "guidance"}]},
    },
    "adwin": {"method": {"name": "adwin", "horizon": {"tokens": 3, "every": 2, "low": 0.999, "high": 1.0}}},
}
"""What a case changes in TrOPD's run."""
EVALUATED = {"every": 2, "num_samples": 1, "max_new_tokens": 20, "data": {"limit": 2}}


def begins_early(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Right are texts that begin in the first half of the alphabet of bytes."""
    return [float(text[:1] < "P") for text in completions]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def write_file(world: Path, directory: Path, case: str, **changes: Any) -> Path:
    """A run file as a user writes it."""
    evaluation = {**EVALUATED, "data": {"path": str(world / "four.jsonl"), "limit": 2}}
    values = values_of(world, "short", output=str(directory), steps=4, evaluation=evaluation)
    values = merged(merged(values, PLUS.get(case, {})), changes)
    path = directory.with_name(directory.name + ".toml")
    path.write_text(tomli_w.dumps(values))
    return path


def steps_of(directory: Path) -> list[StepRecord]:
    return read_records(directory / "records.jsonl").steps


def rows_of(directory: Path, step: int) -> list[dict[str, Any]]:
    return parquet.read_table(directory / "rollouts" / f"step_{step:06d}.parquet").to_pylist()


def left_behind(directory: Path) -> dict[str, Any]:
    """Everything to the last bit, but for what names the run."""
    found = run_case.trace(directory)
    return {**found, "records": found["records"][1:]}


@pytest.mark.parametrize("case", PLUS)
def test_a_run_goes_on_bit_for_bit_from_any_checkpoint(world: Path, tmp_path: Path, case: str) -> None:
    whole = train(Run.load(write_file(world, tmp_path / "run", case)))
    expected = run_case.trace(whole)
    for step in (3, 1):
        copy = shutil.copytree(whole, tmp_path / f"from {step}")
        resume(copy, step=step)
        assert run_case.trace(copy) == expected


@pytest.mark.slow
@pytest.mark.parametrize("case", PLUS)
def test_a_run_that_is_killed_goes_on_bit_for_bit(world: Path, tmp_path: Path, case: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = run_case.train(write_file(world, whole, case), whole)
    assert ended.code == 0, ended.said
    kill_at(write_file(world, killed, case), killed, [(recorded(1), 0.0), (recorded(3), 0.0)])
    assert run_case.trace(killed) == run_case.trace(whole)


def test_a_horizon_at_the_budget_is_none_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    plain = train(Run.load(write_file(world, tmp_path / "plain", "plain")))
    far = {"rollout": {"plus": [{"name": "horizon", "tokens": NEW_TOKENS}]}}
    wide = train(Run.load(write_file(world, tmp_path / "wide", "plain", **far)))
    assert left_behind(wide) == left_behind(plain)
    assert all("rollout/horizon" not in record.probes for record in steps_of(wide))


def test_what_a_horizon_cuts_is_not_too_long_and_counts_in_no_reward(world: Path, tmp_path: Path) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", "horizon", method={"name": "opd"})))
    plain = train(Run.load(write_file(world, tmp_path / "plain", "plain", method={"name": "opd"})))
    for record in steps_of(directory):
        rows = rows_of(directory, record.step)
        assert record.probes["rollout/horizon"] == 9 and record.probes["finish/truncated"] == 0
        assert all(len([x for x in row["authors"] if x == "student"]) <= 9 for row in rows)
        assert {row["finish"] for row in rows} <= {"horizon", "stop"}
        ended = [row["reward"] for row in rows if row["finish"] == "stop"]
        assert record.probes.get("reward/mean") == (sum(ended) / len(ended) if ended else None)
    for horizon, full in zip(rows_of(directory, 0), rows_of(plain, 0), strict=True):
        assert full["token_ids"][: len(horizon["token_ids"])] == horizon["token_ids"], "the first tokens are the same"
    evaluated = [record.evaluation for record in steps_of(directory) if record.evaluation]
    assert any(found["length/mean"] > 9 for found in evaluated), "an evaluation has its own budget"
    header = json.loads((directory / "records.jsonl").read_text().splitlines()[0])
    assert header["before"]["length/mean"] > 9


def test_a_horizon_grows_over_training(world: Path, tmp_path: Path) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", "growing")))
    assert [record.probes.get("rollout/horizon") for record in steps_of(directory)] == [6, 17, None, None]


def test_horizons_without_a_token_are_refused(world: Path, tmp_path: Path) -> None:
    for knobs, says in (
        ({"tokens": 0}, "tokens"),
        ({"share": {"shape": "linear", "start": 1.0, "end": 0.0}}, "a response has at least one token"),
        ({"share": {"shape": "constant", "start": 1.5}}, "up to 1 is needed"),
    ):
        plus = {"rollout": {"plus": [{"name": "horizon", **knobs}]}}
        with pytest.raises(ConfigError, match=says):
            Run.load(write_file(world, tmp_path / "run", "plain", **plus))


def test_time_and_memory_are_planned_up_to_the_horizon(world: Path, tmp_path: Path) -> None:
    def planned(case: str) -> Any:
        return make_forecast(Run.load(write_file(world, tmp_path / "run", case)), DEVICES["h100"])

    plain, cut, growing = planned("plain"), planned("horizon"), planned("growing")
    assert plain.texts.new == NEW_TOKENS and cut.texts.new == 9 and growing.texts.new == (6 + 17 + 28 + 28) / 4
    assert cut.seconds["write"] < growing.seconds["write"] < plain.seconds["write"]
    assert cut.each.keys_and_values < plain.each.keys_and_values == growing.each.keys_and_values


def test_a_gated_teacher_waits_where_a_horizon_cut_everything(world: Path, tmp_path: Path) -> None:
    teacher = {"path": "start", "follow": {"rule": "gated", "min_steps": 1, "rise": 0.0, "tail": 9.0}}
    one = {"rollout": {"plus": [{"name": "horizon", "tokens": 1}]}, "method": {"name": "opd"}}
    path = write_file(world, tmp_path / "run", "plain", **one, teacher=teacher)
    directory = train(Run.load(path))
    assert all(row["finish"] == "horizon" for row in rows_of(directory, 3))


def test_a_grader_beside_a_horizon_is_noted(world: Path, tmp_path: Path) -> None:
    says = "the horizon of the rollouts is 9 tokens at the least. The grader is shown what is cut there"
    parts = load_parts(Run.load(write_file(world, tmp_path / "run", "horizon")), tmp_path)
    assert any(says in note for note in parts.notes)
    parts = load_parts(Run.load(write_file(world, tmp_path / "run", "plain")), tmp_path)
    assert not any("horizon" in note for note in parts.notes)


def test_a_server_writes_up_to_the_horizon_what_this_process_would(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as server:
        rollout = {"servers": [server.url], "plus": [{"name": "horizon", "tokens": 9}]}
        directory = train(run_of(world, {"name": "opd"}, output=str(tmp_path / "far"), rollout=rollout, steps=2))
        asked = [r["max_tokens"] for r in server.requests if r.get("max_tokens", 0) > 1]
    assert set(asked) == {9}
    assert {row["finish"] for row in rows_of(directory, 1)} <= {"horizon", "stop"}
    assert [record.probes["rollout/horizon"] for record in steps_of(directory)] == [9, 9]
