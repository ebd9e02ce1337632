"""A server that goes away when it should take the weights costs no step that was trained."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.integration.runs import prepare, run_in
from tests.servers.mini import MiniServer
from tests.servers.proxy import Fault, Proxy, Reply, status, untouched
from tropd.errors import DataError, EngineError, EngineTimeout
from tropd.loop import resume, train

OPD = {"name": "opd"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("world"))


def gone_from(update: int) -> Fault:
    """Nobody is there when weights are given for the n-th time, or ever after."""
    updates, away = itertools.count(1), []

    def fault(number: int, request: bytes, reply: Reply) -> Reply:
        if json.loads(request).get("method") == "reload_weights" and next(updates) >= update:
            away.append(number)
        return status(503)(number, request, reply) if away else reply

    return fault


def asked(world: Path, output: Path, url: str, **changes: Any) -> Any:
    rollout = {"servers": [url], "server": {"deadline_seconds": 0.5}, **changes.pop("rollout", {})}
    seldom = {"steps": 4, "checkpoint": {"every": 50}}
    return run_in(world, OPD, output=str(output), rollout=rollout, **seldom, **changes)


@pytest.mark.parametrize("staleness", [0, 1])
def test_the_step_that_was_trained_is_kept_and_the_resumed_run_is_the_undisturbed_one(
    staleness: int, world: Path, tmp_path: Path
) -> None:
    rollout, broken = {"staleness": staleness}, tmp_path / "broken"
    with MiniServer(world / "student") as server, Proxy(server.url) as proxy:
        train(asked(world, tmp_path / "whole", proxy.url, rollout=rollout))
        proxy.fault = gone_from(update=3)  # at the start, after step 0, after step 1
        with pytest.raises(EngineTimeout, match="503.* The 2 steps before are kept. Go on with: tropd resume"):
            train(asked(world, broken, proxy.url, rollout=rollout))
        assert run_case.num_recorded(broken) == 2
        assert [folder.name for folder in (broken / "checkpoints").iterdir()] == ["step_000002"]
        proxy.fault = untouched
        resume(broken)
    assert run_case.trace(broken) == run_case.trace(tmp_path / "whole")


def test_a_kept_run_goes_on_with_a_server_elsewhere_but_not_with_other_prompts(world: Path, tmp_path: Path) -> None:
    rows = (world / "data.jsonl").read_text().splitlines()
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**json.loads(row), "id": n}) + "\n" for n, row in enumerate(rows)))
    how = {"data": {"path": str(data), "id_column": "id"}, "rollout": {"staleness": 1}}
    broken = tmp_path / "broken"
    with MiniServer(world / "student") as server, MiniServer(world / "student") as other:
        with Proxy(server.url, gone_from(update=3)) as proxy, pytest.raises(EngineTimeout, match="are kept"):
            train(asked(world, broken, proxy.url, **how))
        file = broken / "run.toml"
        file.write_text(file.read_text().replace(proxy.url, other.url).replace("deadline_seconds = 0.5", ""))
        kept = data.read_text()
        data.write_text(kept.replace("+", "*"))
        with pytest.raises(DataError, match="continuing would show other prompts"):
            resume(broken)
        data.write_text(kept)
        resume(broken)
        train(asked(world, tmp_path / "whole", other.url, **how))
    assert run_case.num_recorded(broken) == 4
    assert run_case.trace(broken) == run_case.trace(tmp_path / "whole")


class Eater(MiniServer):
    """Leaves a file in the place of the weights when it has read them for the n-th time."""

    last = 0

    def reload(self, body: dict[str, Any]) -> dict[str, Any]:
        found = super().reload(body)
        self.last -= 1
        if self.last == 0:
            memory = Path(body["kwargs"]["weights_path"]).parent
            shutil.rmtree(memory)
            memory.write_text("")
        return found


def test_weights_that_cannot_be_written_for_servers_cost_no_step(world: Path, tmp_path: Path) -> None:
    memory, broken = tmp_path / "memory", tmp_path / "broken"
    rollout = {"weights_folder": str(memory)}
    with Eater(world / "student") as server:
        train(asked(world, tmp_path / "whole", server.url, rollout=rollout))
        server.last = 2  # at the start and after step 0
        said = r"for the servers could not be written to .*memory/tropd-broken.* The 2 steps before are kept\. Go on"
        with pytest.raises(EngineError, match=said):
            train(asked(world, broken, server.url, rollout=rollout))
        memory.unlink()
        resume(broken)
    assert run_case.trace(broken) == run_case.trace(tmp_path / "whole")


def test_a_step_whose_evaluation_is_missing_is_not_kept(world: Path, tmp_path: Path) -> None:
    """A run that goes on from there would never evaluate it."""
    held_out = {"data": {"path": str(world / "data.jsonl")}, "every": 2, "limit": 2, "max_new_tokens": 4}
    fails = pytest.raises(EngineTimeout, match="503")
    with MiniServer(world / "student") as server, Proxy(server.url, gone_from(3)) as proxy, fails as caught:
        train(asked(world, tmp_path / "run", proxy.url, evaluation=held_out))
    assert "kept" not in str(caught.value) and run_case.num_recorded(tmp_path / "run") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()
