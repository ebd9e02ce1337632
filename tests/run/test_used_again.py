"""Replayed rollouts and phased texts in whole runs, in this process and on servers."""

from __future__ import annotations

import shutil
import tomllib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests import run_case
from tests.run.test_lengths import left_behind, rows_of, steps_of
from tests.servers.mini import MiniServer
from tests.small_runs import run_of, write_models
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.errors import CheckpointError, ConfigError
from tropd.monitoring.alarms import Alarms
from tropd.run.start import resume, train
from tropd.run.state import State, restore
from tropd.training.assembly import load_parts
from tropd.training.source import Source

OPD = {"name": "opd"}
REPLAY = {"num_prompts": 4, "policy": {"name": "replay", "share": 0.5, "max_age": 2}}
FADING = {"name": "phased", "share": {"shape": "linear", "start": 1.0, "end": 0.0}}
LATE = {"learning_rate": 1e-2, "epsilon": 1e-2}
"""AdamW divides by the gradient's own size: this epsilon keeps rounding errors from becoming steps."""
GRADED: Counter[str] = Counter()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def counts(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    """Another number each time, so that a second grade of the same text would show."""
    GRADED["texts"] += len(completions)
    return [float(GRADED["texts"] - n) for n in range(len(completions))]


def begins_early(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
    return [float(text[:1] < "P") for text in completions]


def replayed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row["id"].startswith("again")]


def test_what_is_used_again_keeps_its_grade_its_draws_and_its_age(world: Path, tmp_path: Path) -> None:
    GRADED.clear()
    grader = f"{__name__}:counts"
    run = run_of(world, OPD, output=str(tmp_path / "run"), rollout=REPLAY, steps=6, optimizer=LATE, grader=grader)
    directory = train(run)
    originals: dict[str, dict[str, Any]] = {}
    for record in steps_of(directory):
        rows = rows_of(directory, record.step)
        again = replayed(rows)
        assert len({row["id"] for row in rows}) == len(rows) == 8 and len(again) == (4 if record.step else 0)
        for row in again:
            original = originals[row["id"].partition("/")[2]]
            for column in ("token_ids", "behavior_logprobs", "reward", "policy_version", "prompt_id", "finish"):
                assert row[column] == original[column]
            assert 1 <= record.step - row["policy_version"][0] <= 2
        assert record.probes["rollout/replayed"] == len(again) / 8
        ages = [record.step - row["policy_version"][0] for row in rows]
        assert (record.probes["staleness/mean"], record.probes["staleness/max"]) == (sum(ages) / 8, max(ages))
        assert ("staleness/drift" in record.probes) == (record.step > 0) == ("mismatch/behavior" not in record.probes)
        originals |= {row["id"]: row for row in rows}
    assert all(record.probes["staleness/drift"] > 1e-5 for record in steps_of(directory)[1:]), "the student has moved"


@pytest.mark.parametrize("knob", [{"share": 0.0}, {"max_age": 0}], ids=str)
def test_replay_of_nothing_is_on_policy_to_the_last_bit(world: Path, tmp_path: Path, knob: dict[str, float]) -> None:
    plain = train(run_of(world, OPD, output=str(tmp_path / "plain"), steps=3))
    policy = {"policy": {"name": "replay", **knob}}
    none = train(run_of(world, OPD, output=str(tmp_path / "none"), steps=3, rollout=policy))
    found, expected = left_behind(none), left_behind(plain)
    for record in found["records"]:
        for name in ("rollout/replayed", "staleness/mean", "staleness/max"):
            record["probes"].pop(name, None)
    assert found == expected


CUT: dict[str, dict[str, Any]] = {
    "horizon": {"rollout": {"plus": [{"name": "horizon", "tokens": 9}]}},
    "adaptive": {"rollout": {"policy": {"name": "adaptive_horizon", "tokens": 4, "every": 2}}},
    "replay": {"rollout": REPLAY},
    "phased": {"rollout": {"policy": FADING}, "grader": f"{__name__}:begins_early"},
}


@pytest.mark.parametrize("case", CUT)
def test_a_run_is_the_same_however_it_is_written_and_cut(world: Path, tmp_path: Path, case: str) -> None:
    runs = []
    for name, tokens, most in (("whole", 10_000, 64), ("cut", 40, 3)):
        changes = {**CUT[case], "tokens_per_micro_batch": tokens, "optimizer": LATE, "steps": 3}
        changes["rollout"] = {**changes["rollout"], "max_batch": most}
        runs.append(train(run_of(world, OPD, output=str(tmp_path / name), **changes)))
    for one, other in zip(*map(steps_of, runs), strict=True):
        assert [row["token_ids"] for row in rows_of(runs[0], one.step)] == [
            row["token_ids"] for row in rows_of(runs[1], one.step)
        ]
        assert other.loss == pytest.approx(one.loss, rel=1e-4, abs=1e-6)
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)
        for name in ("gradient/cosine", "rollout/horizon", "rollout/replayed"):
            assert other.probes.get(name) == pytest.approx(one.probes.get(name), abs=1e-5)


def test_texts_that_pass_are_the_teachers_while_their_share_fades_and_are_written_once(
    world: Path, tmp_path: Path
) -> None:
    changes = {**CUT["phased"], "data": {"path": str(world / "four.jsonl")}, "steps": 4}
    guided = {**OPD, "plus": [{"name": "guidance"}]}
    directory = train(run_of(world, guided, output=str(tmp_path / "run"), **changes))
    shares = []
    for record in steps_of(directory):
        rows = rows_of(directory, record.step)
        theirs = [row for row in rows if "teacher" in row["authors"]]
        assert all(row["reward"] == 1 and "student" not in row["authors"] for row in theirs)
        shares.append(len(theirs) / len(rows))
        assert record.terms["guidance"].tokens == sum(row["authors"].count("teacher") for row in theirs)
    assert 0 < shares[0] < 1 and shares[0] + shares[1] > shares[2] + shares[3]
    texts = run_case.read_texts(directory / "teacher_texts.sqlite")
    assert 6 <= len(texts) <= 8, "two texts for each of four prompts, although each is visited three times"


def test_right_texts_need_a_grader(world: Path, tmp_path: Path) -> None:
    run = run_of(world, OPD, output=str(tmp_path / "run"), rollout={"policy": FADING}, grader=None)
    says = "lets a grader decide what it takes .* but there is no grader. Set `grader`"
    with pytest.raises(ConfigError, match=says):
        train(run)
    assert any(
        check.level == "error" and "lets a grader decide" in check.found for check in examine(run, num_prompts=0)
    )
    policy = {"policy": {**FADING, "verified": False}}
    train(run_of(world, OPD, output=str(tmp_path / "unverified"), rollout=policy, grader=None, steps=1))


def test_replay_needs_data_that_are_kept(world: Path, tmp_path: Path) -> None:
    run = run_of(world, OPD, output=str(tmp_path / "run"), rollout=REPLAY, data={"streaming": True})
    with pytest.raises(ConfigError, match="data.streaming is true and no prompt is kept"):
        train(run)


def test_the_doctor_tries_a_phased_run(world: Path, tmp_path: Path) -> None:
    run = run_of(world, OPD, output=str(tmp_path / "run"), **CUT["phased"])
    assert not [check for check in examine(run, num_prompts=2) if check.level == "error"]


@pytest.mark.parametrize("case", ["replay", "phased"])
def test_a_served_student_goes_on_bit_for_bit(world: Path, tmp_path: Path, case: str) -> None:
    local = train(run_of(world, OPD, output=str(tmp_path / "local"), steps=3, **CUT[case]))
    with MiniServer(world / "student") as server:
        changes = {**CUT[case], "rollout": {**CUT[case]["rollout"], "servers": [server.url]}, "steps": 3}
        far = train(run_of(world, OPD, output=str(tmp_path / "far"), **changes))
        resume(copy := shutil.copytree(far, tmp_path / "copy"), step=2)
        assert run_case.trace(copy) == run_case.trace(far)
    for one, other in zip(rows_of(local, 1), rows_of(far, 1), strict=True):
        assert (one["id"], one["authors"][:8]) == (other["id"], other["authors"][:8])
    if case == "replay":
        assert len(replayed(rows_of(far, 2))) == 4


def test_what_is_used_again_is_known_ahead_and_after_an_interruption(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as server:
        rollout = {**REPLAY, "servers": [server.url], "staleness": 1}
        rollout["policy"] = {"name": "replay", "share": 0.5, "max_age": 4}
        far = train(run_of(world, OPD, output=str(tmp_path / "far"), rollout=rollout, steps=4))
        resume(copy := shutil.copytree(far, tmp_path / "copy"), step=3)
        assert run_case.trace(copy) == run_case.trace(far)
    for record in steps_of(far):
        again = replayed(rows_of(far, record.step))
        assert record.probes["rollout/replayed"] == len(again) / 8 == (0.5 if record.step > 1 else 0)
        assert record.probes["staleness/max"] <= 4


def test_a_run_file_that_names_another_policy_does_not_take_over_its_memory(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = train(run_of(world, OPD, output=str(tmp_path / "run"), rollout=REPLAY, steps=3))
    assert main(["inspect", str(directory), "--step", "2"]) == 0
    assert "policy.Replay/00000002 = a text of" in " ".join(capsys.readouterr().out.split())
    shutil.rmtree(directory / "model")
    values = tomllib.loads((directory / "run.toml").read_text())
    values["rollout"]["policy"] = {"name": "adaptive_horizon"}
    (directory / "run.toml").write_text(tomli_w.dumps(values))
    capsys.readouterr()
    assert main(["resume", str(directory)]) != 0
    said = capsys.readouterr()
    assert "was made by another run than" in said.out + said.err and "Traceback" not in said.out + said.err
    parts = load_parts(Run.load(directory / "run.toml"), directory)
    saved = checkpoints.load(sorted((directory / "checkpoints").glob("*"))[-1])
    with pytest.raises(CheckpointError, match="remembers 'policy.Replay/.*belongs to another method or another policy"):
        restore(parts, State(Source(parts)), Alarms(), saved)


def test_a_buffer_that_can_hold_no_prompt_is_refused_and_one_without_other_prompts_is_told(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    with pytest.raises(ConfigError, match="replay.size = 1 rollouts are kept, but a prompt has"):
        load_parts(run_of(models, rollout={"num_rollouts": 2, "plus": [{"name": "replay", "size": 1}]}), tmp_path)
    run = run_of(models, rollout={"num_prompts": 20, "num_rollouts": 1, "plus": ["replay"]})
    assert any("nothing is used again (replay)" in note for note in load_parts(run, tmp_path).notes)
