"""A teacher on servers that follows the student says what the copy in this process would say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import launch
from tests.servers.mini import MiniServer
from tests.small_runs import run_of
from tests.told import COLUMN, write_world
from tropd.errors import ConfigError, TeacherError
from tropd.monitoring.records import read_records
from tropd.run.start import resume, train

LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def following(world: Path, output: Path, *servers: MiniServer, **changes: Any) -> Any:
    teacher = {
        "path": "start",
        "briefing": COLUMN,
        "follow": {"rule": "copy", "every": 2},
        "servers": tuple(server.url for server in servers),
        "server": {"deadline_seconds": 2.0},
        **changes.pop("teacher", {}),
    }
    values = {"teacher": teacher, "data": {"path": str(world / "told.jsonl")}, "optimizer": {"learning_rate": 1e-2}}
    method = {"name": "tropd", "top_k": 8, "beta": 0.1}
    return run_of(world, method, kind="quick", **{"output": str(output), "steps": 4, **values, **changes})


@pytest.mark.parametrize("student", [{}, LORA], ids=["whole", "adapter"])
def test_servers_get_the_teacher_after_each_move_and_a_resumed_run_gives_it_again(
    student: dict[str, Any], world: Path, tmp_path: Path
) -> None:
    local = train(following(world, tmp_path / "local", student=student))
    with MiniServer(world / "student") as server:
        far = train(following(world, tmp_path / "far", server, student=student))
        given = [r for r in server.requests if r.get("method") == "reload_weights" or "lora_path" in r]
    assert len(given) == 2, "at the start and after two steps; what the last step moves nobody reads"
    steps, expected = (read_records(folder / "records.jsonl").steps for folder in (far, local))
    for one, other in zip(steps, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, abs=1e-4) and one.tokens == other.tokens
        assert one.probes["ratio/mean"] == pytest.approx(other.probes["ratio/mean"], abs=1e-4)
    with MiniServer(world / "student") as server:  # has the weights of the start again
        url = server.url
        text = (far / "run.toml").read_text()
        (far / "run.toml").write_text(text.replace(given_url(text), url))
        resume(far, step=3)
    again = read_records(far / "records.jsonl").steps
    assert again[3].loss == pytest.approx(steps[3].loss, abs=1e-5)


def given_url(text: str) -> str:
    return text.split("http://")[1].split('"')[0].join(["http://", ""])


@pytest.mark.parametrize(("model", "step"), [("student", "step 1: "), ("teacher", "")])
def test_a_server_that_does_not_take_the_weights_is_noticed_before_it_scores(
    model: str, step: str, world: Path, tmp_path: Path
) -> None:
    said = f"{step}teacher default has moved, and its servers cannot follow: .* not compute with the teacher's weights"
    with MiniServer(world / model, ignores_reload=True) as server, pytest.raises(TeacherError) as refused:
        train(following(world, tmp_path / "run", server, teacher={"follow": {"rule": "copy"}}))
    assert re.match(said, str(refused.value)) and "raise teacher.server.canary_nats" in str(refused.value)


def test_servers_that_take_no_weights_and_kept_scores_are_refused(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as server:
        with pytest.raises(ConfigError, match='server.kind is "sglang", but .* Serve it with vLLM, or leave'):
            train(following(world, tmp_path / "run", server, teacher={"server": {"kind": "sglang"}}))
        with pytest.raises(ConfigError, match="teacher.score_cache keeps what servers say of a text, but"):
            following(world, tmp_path / "run", server, teacher={"score_cache": True})


@pytest.mark.slow
def test_two_processes_give_the_weights_once(world: Path, tmp_path: Path) -> None:
    alone = train(following(world, tmp_path / "alone"))
    with MiniServer(world / "student") as server:
        (tmp_path / "run.toml").write_text(following(world, tmp_path / "run", server).dump())
        launch.run(2, train=tmp_path / "run.toml", directory=tmp_path / "run")
        given = [r for r in server.requests if r.get("method") == "reload_weights"]
    assert len(given) == 2
    steps, expected = (read_records(folder / "records.jsonl").steps for folder in (tmp_path / "run", alone))
    assert [one.loss for one in steps] == pytest.approx([one.loss for one in expected], abs=1e-3)
