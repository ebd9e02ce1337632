"""Rollouts that are written ahead: one step old and never older, known as such, and the same after an interruption."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet

from tests import run_case
from tests.one_step import judge, parts_of, step_of
from tests.run_case import Order
from tests.servers.mini import MiniServer
from tests.servers.proxy import Proxy, Reply, status
from tests.servers.test_rollouts import nudge
from tests.small_runs import TROPD, run_of, write_models, write_run
from tropd.base.fast_paths import FastPath
from tropd.errors import ConfigError, EngineTimeout, TeacherError
from tropd.monitoring.records import read_records
from tropd.objective.support import NOTHING
from tropd.run.start import resume, train
from tropd.teachers.teacher import ScoreRequest
from tropd.training.source import Source

OPD = {"name": "opd"}
BATCH = 6
SERVED = {FastPath.WRITING_AHEAD, FastPath.KEPT_TEXTS, FastPath.KEPT_SCORES, FastPath.FUSED_HEAD}
"""What a continued run with both models on servers takes."""
QUICK = {"deadline_seconds": 0.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def rows_of(directory: Path, step: int) -> list[dict[str, Any]]:
    return parquet.read_table(directory / "rollouts" / f"step_{step:06d}.parquet").to_pylist()


def versions(directory: Path, num_steps: int) -> list[set[int]]:
    """The weights that wrote the rollouts of each step."""
    return [{v for row in rows_of(directory, step) for v in row["policy_version"]} for step in range(num_steps)]


class Counted:
    """Knows when the first rollout of the second batch is asked for; `broken` spoils all further ones."""

    def __init__(self) -> None:
        self.texts, self.second, self.broken = 0, threading.Event(), False

    def __call__(self, number: int, request: bytes, reply: Reply) -> Reply:
        if json.loads(request).get("max_tokens", 1) == 1:  # a known text, or no text at all
            return reply
        self.texts += 1
        if self.texts > BATCH:
            self.second.set()
            return status(503)(number, request, reply) if self.broken else reply
        return reply


asked = Counted()


def grade_late(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """Grades the first batch only when the second one is being written; before it, answers of the data are tried."""
    if asked.texts:
        assert asked.second.wait(30.0), "the step waits for its grades, and nobody writes the next batch"
    return [0.0] * len(completions)


def test_a_batch_is_written_while_the_one_before_it_is_trained(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__name__ + ".asked", Counted())
    with MiniServer(world / "student") as server, Proxy(server.url, asked) as proxy:
        rollout = {"servers": [proxy.url], "staleness": 1}
        grader = f"{__name__}:grade_late"
        directory = train(run_of(world, OPD, output=str(tmp_path / "run"), rollout=rollout, grader=grader, steps=4))
    assert versions(directory, 4) == [{0}, {0}, {1}, {2}]
    first, *later = read_records(directory / "records.jsonl").steps
    assert first.probes["staleness/max"] == 0 and "staleness/drift" not in first.probes
    for record in later:
        assert record.probes["staleness/mean"] == record.probes["staleness/max"] == 1
        assert record.probes["staleness/drift"] > 1e-5, "ratios are made with other weights than those of the step"
        assert "mismatch/behavior" not in record.probes


def test_ratios_and_the_teachers_top_k_are_those_of_the_student_that_trains(world: Path, tmp_path: Path) -> None:
    """The loss of a batch that another student wrote is -rho (log pi_T - log pi_S), rho = pi_S / pi_behavior."""
    with MiniServer(world / "student") as server:
        rollout = {"servers": [server.url], "staleness": 1}
        parts = parts_of(world, OPD, output=str(tmp_path), rollout=rollout)
        source = Source(parts)
        source.take(0)
        source.begin(1)
        source.wait()
        nudge(parts.model, 0.05)
        rollouts = source.take(1).rollouts
    expected = []
    for rollout, score in zip(rollouts, parts.teacher.score(ScoreRequest(rollouts)), strict=True):
        start = len(rollout.prompt.token_ids)
        with torch.no_grad():
            rows_TV = parts.model(torch.tensor([rollout.token_ids])).logits[0].log_softmax(-1)[start - 1 : -1]
        own_T = rows_TV.gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        rho_T = (own_T - torch.tensor(rollout.behavior_logprobs[start:])).exp()
        assert float((rho_T - 1).abs().max()) > 0.01
        expected.append(-rho_T * (score.logprobs_T - own_T))
    assert step_of(parts, rollouts).sums.loss == pytest.approx(float(torch.cat(expected).mean()), abs=1e-5)

    parts = parts_of(world, TROPD, output=str(tmp_path))
    top_NK = judge(parts, rollouts).tokens.teacher_topk_logprobs_NK
    assert bool((top_NK > NOTHING).all()), "which tokens are outliers is not known before the student is asked"


def test_without_staleness_nothing_is_written_ahead(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as server:
        rollout = {"servers": [server.url], "staleness": 0, "max_new_tokens": 6}
        directory = train(run_of(world, OPD, output=str(tmp_path / "run"), rollout=rollout))
    assert versions(directory, 3) == [{0}, {1}, {2}]
    for record in read_records(directory / "records.jsonl").steps:
        assert not any(name.startswith("staleness") for name in record.probes)
        assert record.probes["mismatch/behavior_max"] < 1e-4


@pytest.mark.parametrize("case", ["tropd", pytest.param("streaming", marks=pytest.mark.slow)])
def test_a_run_that_is_interrupted_and_killed_ends_like_one_left_alone(case: str, models: Path, tmp_path: Path) -> None:
    """With a teacher here, and with one on a server that writes and scores ahead as well."""
    with MiniServer(models / "student") as student, MiniServer(models / "teacher") as teacher:
        changes: dict[str, Any] = {
            "steps": 6,
            "rollout": {"servers": [student.url], "staleness": 1, "num_prompts": 2},
            "evaluation": {"every": 4, "limit": 1},
        }
        if case == "tropd":
            changes["teacher"] = {"servers": [teacher.url], "score_cache": True}
        straight, broken = tmp_path / "straight", tmp_path / "broken"
        ended = run_case.train(write_run(models, straight, case, **changes), straight)
        assert ended.code == 0, ended.said
        ended = run_case.train(write_run(models, broken, case, **changes), broken, stop_after=2)
        assert ended.code == 0, ended.said
        killed = run_case.start(Order(directory=broken)).kill_when(lambda: run_case.num_recorded(broken) >= 4, 0.02)
        ended = run_case.resume(broken)
        assert killed and ended.code == 0, ended.said
    if case == "tropd":
        assert ended.took >= SERVED, "what was not taken was not compared"
    assert [r.probes["staleness/max"] for r in read_records(broken / "records.jsonl").steps] == [0.0] + [1.0] * 5
    assert run_case.trace(broken) == run_case.trace(straight)


def test_a_batch_that_could_not_be_written_costs_no_trained_step_and_no_prompt(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(__name__ + ".asked", Counted())
    with MiniServer(world / "student") as server, Proxy(server.url, asked) as proxy:
        rollout = {"servers": [proxy.url], "staleness": 1, "max_new_tokens": 6, "server": QUICK}
        whole, broken = (
            run_of(world, OPD, output=str(tmp_path / name), rollout=rollout, steps=4) for name in ("whole", "broken")
        )
        train(whole)
        asked.texts, asked.broken = 0, True
        with pytest.raises(EngineTimeout, match="503"):
            train(broken)
        directory = tmp_path / "broken"
        assert len(read_records(directory / "records.jsonl").steps) == 1
        asked.broken = False
        resume(directory)
    assert versions(directory, 4) == [{0}, {1}, {1}, {2}], "what was not written is written with the weights at hand"
    for step in range(4):
        assert [r["id"] for r in rows_of(directory, step)] == [r["id"] for r in rows_of(tmp_path / "whole", step)]


def test_a_teacher_that_fails_ahead_is_asked_again_in_its_own_step(world: Path, tmp_path: Path) -> None:
    """What was trained is kept, and so is the batch that was written ahead: it is not drawn again."""

    def spoil(number: int, request: bytes, reply: Reply) -> Reply:
        scores = json.loads(request).get("prompt_logprobs") is not None
        failing = scores and run_case.num_recorded(tmp_path / "run") >= 1  # step 1 is scored already, step 2 is not
        return status(503)(number, request, reply) if failing else reply

    with (
        MiniServer(world / "student") as student,
        MiniServer(world / "teacher") as teacher,
        Proxy(teacher.url, spoil) as proxy,
    ):
        rollout = {"servers": [student.url], "staleness": 1, "max_new_tokens": 6}
        served = {"servers": [proxy.url], "server": QUICK}
        seldom: dict[str, Any] = {"rollout": rollout, "checkpoint": {"every": 50}}
        whole = {"servers": [teacher.url]}
        train(run_of(world, TROPD, output=str(tmp_path / "whole"), teacher=whole, **seldom))
        run = run_of(world, TROPD, output=str(tmp_path / "run"), teacher=served, **seldom)
        with pytest.raises(TeacherError, match=r"step \d: .*503.*The batch is in"):
            train(run)
        assert run_case.num_recorded(tmp_path / "run") == 2
        proxy.fault = lambda number, request, reply: reply
        resume(tmp_path / "run")
    assert len(read_records(tmp_path / "run" / "records.jsonl").steps) == 3
    a, b = (rows_of(tmp_path / name, 2) for name in ("whole", "run"))
    assert [row["token_ids"] for row in a] == [row["token_ids"] for row in b]


def test_what_cannot_be_written_ahead_is_refused_and_what_is_biased_then_is_said(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as server:
        for estimator, biased in (("k2", True), ("policy_gradient", False)):
            rollout = {"servers": [server.url], "staleness": 1}
            parts = parts_of(world, {**OPD, "estimator": estimator}, output=str(tmp_path), rollout=rollout)
            assert any("no importance ratio" in note for note in parts.notes) == biased
    with pytest.raises(ConfigError, match="rollout.servers is empty"):
        run_of(world, rollout={"staleness": 1})
    with pytest.raises(ConfigError, match="would be no earlier"):
        run_of(world, rollout={"staleness": 2, "servers": ["http://127.0.0.1:1"]})
