"""Servers that sleep while this process trains: the run is the same, and nobody trusts weights that were asleep."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.run_case import num_recorded
from tests.servers.mini import MiniServer, Refusal
from tests.servers.sleeper import Sleeper
from tests.servers.test_rollouts import REQUESTS, engine_of
from tests.small_runs import run_of, write_models
from tests.tiny import tiny_model
from tropd.config.run import Run
from tropd.errors import ConfigError, EngineError, EngineOutOfSync, TeacherError
from tropd.monitoring.records import read_records
from tropd.rollout.transformers import TransformersEngine
from tropd.run.start import assemble, resume, train

OPD = {"name": "opd"}
GIVEN = {
    2: ["/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/is_sleeping", "/reset_prefix_cache"],
    1: ["/wake_up", "/v1/load_lora_adapter", "/is_sleeping"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


class Watcher(MiniServer):
    """A teacher that notes whether the student's server sleeps while it scores, and fails when it is told to."""

    def __init__(self, folder: Path, student: Sleeper) -> None:
        super().__init__(folder)
        self.student = student
        self.seen: list[bool] = []
        self.fails: Callable[[], bool] = lambda: False

    def completions(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        self.seen.append(bool(self.student.sleeping))
        if self.fails():
            raise Refusal(400, "not today")
        return super().completions(body, request_id)


def run_on(world: Path, output: Path, server: MiniServer, **changes: Any) -> Run:
    rollout = {"servers": [server.url], "servers_sleep": True, "max_new_tokens": 6, **changes.pop("rollout", {})}
    return run_of(world, OPD, output=str(output), rollout=rollout, **changes)


def losses(directory: Path) -> list[float]:
    return [record.loss for record in read_records(directory / "records.jsonl").steps]


@pytest.mark.parametrize(("student", "level"), [({}, 2), ({"lora": {"rank": 2}}, 1)], ids=["full", "lora"])
def test_servers_sleep_whenever_they_do_not_write_and_the_run_is_the_same(
    student: dict[str, Any], level: int, world: Path, tmp_path: Path
) -> None:
    held_out = {"data": {"path": str(world / "data.jsonl")}, "every": 1, "limit": 2, "max_new_tokens": 4}
    same: dict[str, Any] = {"student": student, "evaluation": held_out, "steps": 2}
    with Sleeper(world / "student") as server, Watcher(world / "teacher", server) as teacher:
        train(run_on(world, tmp_path / "there", server, teacher={"servers": [teacher.url]}, **same))
    paths = [path for path in server.paths if path != "/v1/unload_lora_adapter"]
    asleep, written = [f"/sleep?level={level}", "/is_sleeping"], [*GIVEN[level], "/v1/completions"]
    asked = ["/v1/models", "/server_info?config_format=json", *asleep, *written, *asleep, *written, *asleep, *written]
    assert [path for path, _ in itertools.groupby(paths)] == asked, "the last weights are left with it"
    assert teacher.seen[-4:] == [True] * 4, "it sleeps while the teacher scores"
    train(run_of(world, OPD, output=str(tmp_path / "here"), rollout={"max_new_tokens": 6}, **same))
    assert losses(tmp_path / "there") == pytest.approx(losses(tmp_path / "here"), abs=1e-4)


def test_a_run_that_dies_while_they_sleep_is_resumed_with_its_weights(world: Path, tmp_path: Path) -> None:
    with Sleeper(world / "student") as server, Watcher(world / "teacher", server) as teacher:
        far = {"servers": [teacher.url], "server": {"deadline_seconds": 1.0}}
        train(run_on(world, tmp_path / "whole", server, teacher=far))
        teacher.fails = lambda: num_recorded(tmp_path / "run") >= 1
        with pytest.raises(TeacherError, match="not today"):
            train(run_on(world, tmp_path / "run", server, teacher=far))
        assert server.sleeping, "it died between sleep and wake"
        teacher.fails = lambda: False
        resume(tmp_path / "run")
        assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_engine_that_is_asked_in_its_sleep_gives_the_weights_first(tmp_path: Path, world: Path) -> None:
    model = tiny_model(seed=3, sharp=4.0, tied=True)
    with Sleeper(world / "student") as server:
        engine = engine_of(model, tmp_path, server, sleeps=True)
        texts = engine.generate(REQUESTS)
        engine.rest()
        assert server.sleeping and engine.generate(REQUESTS) == texts and not server.sleeping
    assert [t.token_ids for t in texts] == [t.token_ids for t in TransformersEngine(model).generate(REQUESTS)]


def test_a_run_without_sleep_wakes_whom_another_left_asleep(world: Path, tmp_path: Path) -> None:
    with Sleeper(world / "student") as server:
        assemble(run_on(world, tmp_path / "never", server), tmp_path)
        assert server.sleeping == {"weights", "kv_cache"}
        train(run_on(world, tmp_path / "run", server, rollout={"servers_sleep": False}))
    assert "/wake_up?tags=kv_cache" in server.paths and len(losses(tmp_path / "run")) == 3


def test_weights_that_do_not_come_back_are_caught(world: Path, tmp_path: Path) -> None:
    """It wakes up with nothing in its memory, and says that it has loaded the weights."""
    refused = pytest.raises(EngineOutOfSync, match="does not compute with the student's weights")
    with Sleeper(world / "student", ignores_reload=True) as server, refused:
        train(run_on(world, tmp_path / "run", server))
    assert num_recorded(tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("server", "words"),
    [
        (MiniServer, r"/sleep\?level=2 answered 404.*start vLLM with --enable-sleep-mode and VLLM_SERVER_DEV_MODE=1"),
        (
            lambda folder: Sleeper(folder, flag=False),
            "started without --enable-sleep-mode: it would say that it sleeps",
        ),
        (lambda folder: Sleeper(folder, insomniac=True), "asked to sleep, and says that it does not.*--enable-sleep"),
    ],
    ids=["no route", "no flag", "no sleep"],
)
def test_a_server_that_cannot_sleep_is_refused_before_the_first_step(
    server: Callable[[Path], MiniServer], words: str, world: Path, tmp_path: Path
) -> None:
    with server(world / "student") as running, pytest.raises(EngineError, match=words):
        train(run_on(world, tmp_path / "run", running))
    assert not (tmp_path / "run" / "run.toml").exists()


def test_a_server_that_keeps_its_memory_is_told_of(world: Path, tmp_path: Path) -> None:
    with Sleeper(world / "student", flag=False, device="cpu") as server:
        notes = assemble(run_on(world, tmp_path / "run", server), tmp_path).notes
    assert any("computes on a CPU, where vLLM keeps its memory" in note for note in notes)


def test_sleep_is_refused_where_nobody_would_or_could(world: Path) -> None:
    with pytest.raises(ConfigError, match="nobody would sleep"):
        run_of(world, rollout={"servers_sleep": True})
    with pytest.raises(ConfigError, match="write at that time"):
        run_of(world, rollout={"servers_sleep": True, "staleness": 1, "servers": ["http://127.0.0.1:1"]})
