"""A server that goes away when it should take the weights costs no step that was trained."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.servers.mini import MiniServer
from tests.servers.proxy import Fault, Proxy, Reply, status, untouched
from tests.small_runs import run_of, write_models
from tropd.errors import DataError, EngineError, EngineTimeout
from tropd.run.start import resume, train

OPD = {"name": "opd"}
FEW = 4
"""Tokens of an answer in an evaluation, and of nothing else."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def gone_from(update: int) -> Fault:
    """Nobody is there when weights are given for the n-th time, or ever after."""
    updates, away = itertools.count(1), []

    def fault(number: int, request: bytes, reply: Reply) -> Reply:
        if json.loads(request).get("method") == "reload_weights" and next(updates) >= update:
            away.append(number)
        return status(503)(number, request, reply) if away else reply

    return fault


def asked(world: Path, output: Path, url: str, **changes: Any) -> Any:
    short = {"max_new_tokens": 6, "server": {"deadline_seconds": 0.5}}
    rollout = {"servers": [url], **short, **changes.pop("rollout", {})}
    seldom = {"steps": 4, "checkpoint": {"every": 50}}
    return run_of(world, OPD, output=str(output), rollout=rollout, **seldom, **changes)


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


def no_more_answers(after: int) -> Fault:
    """Every text of an evaluation is refused for now, once so many were written."""
    texts = itertools.count()

    def fault(number: int, request: bytes, reply: Reply) -> Reply:
        if json.loads(request).get("max_tokens") == FEW and next(texts) >= after:
            return status(503)(number, request, reply)
        return reply

    return fault


@pytest.mark.parametrize(
    ("fault", "steps", "staleness"),
    [
        pytest.param(gone_from(3), 2, 0, id="no weights", marks=pytest.mark.slow),
        pytest.param(no_more_answers(5), 2, 1, id="no answers"),
        pytest.param(no_more_answers(9), 4, 0, id="no answers at the end", marks=pytest.mark.slow),
    ],
)
def test_a_step_whose_evaluation_fails_is_kept_and_evaluated_when_the_run_goes_on(
    fault: Fault, steps: int, staleness: int, world: Path, tmp_path: Path
) -> None:
    held_out = {"data": {"path": str(world / "data.jsonl")}, "every": 2, "limit": 2, "max_new_tokens": FEW}
    how: dict[str, Any] = {"evaluation": {**held_out, "num_samples": 1}, "rollout": {"staleness": staleness}}
    whole, broken, kept = tmp_path / "whole", tmp_path / "broken", tmp_path / "kept"
    with MiniServer(world / "student") as server, Proxy(server.url) as proxy:
        train(asked(world, whole, proxy.url, **how))
        proxy.fault = fault
        with pytest.raises(EngineTimeout, match=f"503.* The {steps} steps before are kept. Go on with: tropd resume"):
            train(asked(world, broken, proxy.url, **how))
        assert run_case.num_recorded(broken) == steps - 1, "a record without its evaluation is not one"
        shutil.copytree(broken / "checkpoints", kept)
        proxy.fault = no_more_answers(0)
        with pytest.raises(EngineTimeout, match=f"503.* The {steps} steps before are kept"):
            resume(broken)
        proxy.fault = untouched
        resume(broken)
        assert run_case.trace(broken) == run_case.trace(whole) and said_of_best(broken) == said_of_best(whole)
        shutil.rmtree(broken / "model")  # as if it was killed when the record was written and the checkpoint was not
        shutil.rmtree(broken / "checkpoints")
        kept.rename(broken / "checkpoints")
        resume(broken)
    assert run_case.trace(broken) == run_case.trace(whole) and said_of_best(broken) == said_of_best(whole)


def said_of_best(directory: Path) -> list[Any]:
    state = json.loads((directory / "checkpoints" / "step_000004" / "state.json").read_text())
    return [state[name] for name in ("best", "before", "latest", "stream", "owed")]
