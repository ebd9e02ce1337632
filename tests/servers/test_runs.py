"""A whole run with its teacher on a server is the run with the teacher in this process, or it stops."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from tests.servers.mini import MiniServer
from tests.servers.proxy import Fault, Proxy, Reply, corrupt, cut, first, garbage, status, truncated
from tests.small_runs import run_of, write_models
from tests.tiny import tiny_model
from tropd.errors import ConfigError, EvidenceError, TeacherError, TropdError
from tropd.run.start import resume, train

QUICK = {"deadline_seconds": 1.5, "answer_seconds": 5.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"), teacher=tiny_model(seed=1, tied=True))


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def served(world: Path, url: str, output: Path, **changes: Any) -> Any:
    changes = {"steps": 2, **changes}
    teacher = {"servers": [url], "server": QUICK, **changes.pop("teacher", {})}
    return run_of(world, output=str(output), teacher=teacher, **changes)


def in_steps(fault: Fault) -> Fault:
    """The fault for what steps ask, numbered from 1; a run's start is left alone."""
    numbers = itertools.count(1)

    def chosen(number: int, request: bytes, reply: Reply) -> Reply:
        body = json.loads(request)
        asks = body.get("max_tokens", 0) > 1 or len(body["prompt"]) == 2
        return fault(next(numbers), request, reply) if asks else reply

    return chosen


def test_a_run_on_a_server_is_the_local_run(world: Path, tmp_path: Path) -> None:
    local = train(run_of(world, output=str(tmp_path / "local"), steps=2))
    with MiniServer(world / "teacher") as server:
        far = train(served(world, server.url, tmp_path / "far", teacher={"score_cache": True}))
        texts = [r for r in server.requests if r.get("max_tokens", 0) > 1]
    assert texts, "the server wrote the prefixes too"
    for a, b in zip(records(local), records(far), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)
        assert a["tokens"] == b["tokens"] and a["terms"].keys() == b["terms"].keys()
    assert (far / "teacher_canary.json").exists() and (far / "teacher_scores.sqlite").exists()


def test_a_key_is_in_no_file_of_a_run(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "s3cret-value")
    with MiniServer(world / "teacher", key="s3cret-value") as server:
        teacher = {"server": {**QUICK, "api_key_env": "SOME_KEY"}}
        folder = train(served(world, server.url, tmp_path / "run", steps=1, teacher=teacher))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 5 and all(b"s3cret" not in path.read_bytes() for path in files)
    assert "SOME_KEY" in (folder / "run.toml").read_text()


def test_no_step_is_trained_on_spoiled_answers(world: Path, tmp_path: Path) -> None:
    """Spoiled for a while: the same run.  Spoiled for good: no further step, and what was trained can be resumed."""
    kinds = (cut, truncated, corrupt, garbage)

    def spoil(number: int, request: bytes, reply: Any) -> Any:
        spoiled = number in (2, 5, 7, 10) or number > 40
        return kinds[number % 4](number, request, reply) if spoiled else reply

    with MiniServer(world / "teacher") as server, Proxy(server.url) as proxy:
        clean = train(served(world, server.url, tmp_path / "clean", steps=4))
        proxy.fault = in_steps(spoil)
        with pytest.raises(TeacherError, match=r"The \d steps before are kept. Go on with: tropd resume"):
            train(served(world, proxy.url, tmp_path / "spoiled", steps=4, checkpoint={"every": 50}))
        done = len(records(tmp_path / "spoiled"))
        kept = [folder.name for folder in (tmp_path / "spoiled" / "checkpoints").iterdir()]
        assert 0 < done < 4 and kept == [f"step_{done:06d}"]
        proxy.fault = first(0, cut)
        resume(tmp_path / "spoiled")
        for a, b in zip(records(clean), records(tmp_path / "spoiled"), strict=True):
            assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_another_model_stops_the_run_and_its_resumption(world: Path, tmp_path: Path) -> None:
    other = write_models(tmp_path / "other", teacher=tiny_model(seed=5, tied=True)) / "teacher"
    with MiniServer(world / "teacher") as server, MiniServer(other) as impostor, Proxy(server.url) as proxy:

        def swap(number: int, request: bytes, reply: Any) -> Any:
            proxy.upstream = impostor.url if number > 10 else server.url
            return reply

        proxy.fault = in_steps(swap)
        with pytest.raises(TeacherError, match="another model answers than at the start"):
            train(served(world, proxy.url, tmp_path / "run", steps=3))
        done = len(records(tmp_path / "run"))
        proxy.fault, proxy.upstream = first(0, cut), impostor.url
        with pytest.raises(TeacherError, match="another model answers than at the start"):
            resume(tmp_path / "run")
        proxy.upstream = server.url
        resume(tmp_path / "run")
        assert done < 3 == len(records(tmp_path / "run"))


def test_a_server_that_is_away_for_a_while_is_waited_for(
    world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with MiniServer(world / "teacher") as server, Proxy(server.url) as proxy:
        away = status(503)
        proxy.fault = in_steps(lambda n, request, reply: away(n, request, reply) if 3 <= n < 6 else reply)
        with caplog.at_level(logging.WARNING, "tropd.servers"):
            patient = {"server": {**QUICK, "deadline_seconds": 30.0}}
            train(served(world, proxy.url, tmp_path / "run", steps=1, teacher=patient))
        assert "0 of 1 servers are left; asking it again." in caplog.text and "answers again." in caplog.text


def test_what_cannot_work_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "teacher", max_logprobs=4) as server:
        refusals: list[tuple[type[TropdError], str, dict[str, Any]]] = [
            (TeacherError, "--max-logprobs 8, or lower method.top_k", {}),
            (EvidenceError, "needs FULL from the teacher, which offers SAMPLED and TOPK", {"method": {"name": "gkd"}}),
            (ConfigError, "does not say what they serve", {"teacher": {"path": "base"}}),
            (TeacherError, "serves tiny", {"teacher": {"server": {**QUICK, "model": "huge"}}}),
        ]
        for number, (kind, words, changes) in enumerate(refusals):
            method = changes.pop("method", None)
            with pytest.raises(kind, match=words):
                run = served(world, server.url, tmp_path / str(number), **changes)
                if method:
                    run = run_of(world, method, output=run.output, teacher={"servers": [server.url], "server": QUICK})
                train(run)
            assert not (tmp_path / str(number) / "run.toml").exists()
