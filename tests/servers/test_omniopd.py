"""Whole runs with a teacher that only writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.servers.chat_endpoint import ChatEndpoint, refusing
from tests.small_runs import run_of, write_models, write_run
from tropd.cli.main import main
from tropd.doctor import examine
from tropd.errors import BudgetSpent, ConfigError, EvidenceError
from tropd.planning import DEVICES, make_forecast
from tropd.run.start import resume, train

pytest.importorskip("rapidfuzz", reason="the extra 'omni' is not installed: pip install 'tropd[omni]'")

METHOD = {"name": "omniopd", "chunks": 2, "chunk_tokens": 4, "continuations": 2}
SERVER = {"kind": "openai", "deadline_seconds": 1.5}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def changes(url: str, **teacher: Any) -> dict[str, Any]:
    asked = {"path": "base", "servers": [url], "server": SERVER, "chat": {}, **teacher}
    return {"method": METHOD, "steps": 2, "teacher": asked, "rollout": {"max_new_tokens": 12}}


def omni(world: Path, url: str, output: Path, **teacher: Any) -> Any:
    return run_of(world, output=str(output), **changes(url, **teacher))


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "records.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if "loss" in line]


def test_a_run_that_is_killed_and_resumed_is_the_same_to_the_bit(world: Path, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        names = ("whole", "killed")
        paths = {n: write_run(world, tmp_path / n, "short", **changes(endpoint.url)) for n in names}
        whole = run_case.train(paths["whole"], tmp_path / "whole")
        assert whole.code == 0, whole.message or whole.said
        asked = len(endpoint.requests)
        running = run_case.start(run_case.Order(train=paths["killed"], directory=tmp_path / "killed"))
        assert running.kill_when(lambda: run_case.num_recorded(tmp_path / "killed") >= 1)
        resumed = run_case.resume(tmp_path / "killed")
        assert resumed.code == 0, resumed.message or resumed.said
        assert len(endpoint.requests) < 2.5 * asked
    one, other = (run_case.trace(tmp_path / n) for n in names)
    assert one == other and len(records(tmp_path / "whole")) == 2
    first = records(tmp_path / "whole")[0]
    assert first["probes"]["chunks/audited"] > 0 == first["probes"]["chunks/missing"]
    assert 0 < first["probes"]["chunks/support"] < 1
    assert all(first["terms"][name]["tokens"] > 0 for name in ("audited", "anchor"))
    assert "trust/share" not in first["probes"]  # nobody said how likely a token is


def test_chunks_that_nobody_wrote_fall_to_the_anchor_and_are_counted(world: Path, tmp_path: Path) -> None:
    def second_chunks(number: int, body: dict[str, Any]) -> Any:
        return refusing(number, body) if number % 8 > 4 else None

    with ChatEndpoint(second_chunks) as endpoint:
        server = {**SERVER, "max_requests": 1}
        folder = train(omni(world, endpoint.url, tmp_path / "run", server=server))
    for record in records(folder):
        probes, terms = record["probes"], record["terms"]
        assert probes["chunks/missing"] > 0 < probes["chunks/audited"]
        assert terms["audited"]["tokens"] <= 4 * probes["chunks/audited"]
        assert terms["audited"]["tokens"] + terms["anchor"]["tokens"] == record["tokens"]["student"]


def test_a_run_stops_at_its_budget_and_goes_on_with_a_larger_one(world: Path, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        whole = train(omni(world, endpoint.url, tmp_path / "whole", server={**SERVER, "max_requests": 4}))
        asked = len(endpoint.requests)
        endpoint.requests.clear()
        few = omni(world, endpoint.url, tmp_path / "few", chat={"max_calls": asked - 1})
        with pytest.raises(BudgetSpent, match=r"are spent \(teacher.chat.max_calls\).*tropd resume"):
            train(few)
        assert len(endpoint.requests) < asked and len(records(tmp_path / "few")) == 1
        kept = tmp_path / "few" / "run.toml"
        kept.write_text(kept.read_text().replace(f"max_calls = {asked - 1}", f"max_calls = {asked}"))
        resume(tmp_path / "few")
        assert len(endpoint.requests) == asked
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in records(tmp_path / "few")]


def test_what_will_be_asked_is_priced_before(world: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    run = omni(world, "http://127.0.0.1:9", tmp_path / "run", chat={"max_calls": 40})
    calls = make_forecast(run, DEVICES["h100"]).calls
    assert calls is not None and calls.number == 6 * 2 * 2 and calls.written == 24 * 4
    path = tmp_path / "run.toml"
    path.write_text(run.dump())
    main(["plan", str(path), "--cluster", "1xh100"])
    said = " ".join(capsys.readouterr().out.split())
    assert "calls of the teacher's endpoint │ 24" in said and "calls of the teacher's endpoint │ 48" in said
    assert "The run stops in about step 1 of 2: teacher.chat.max_calls is 40" in said


def test_what_cannot_work_is_refused_before_the_first_step(world: Path, tmp_path: Path) -> None:
    url = "http://127.0.0.1:9"
    for more in ({"bridge": {}}, {"briefing": {"kind": "system", "text": "Be brief."}}, {"score_cache": True}):
        with pytest.raises(ConfigError, match=r"only writes: it has no tokenizer to bridge"):
            omni(world, url, tmp_path / "a", **more)
    with pytest.raises(ConfigError, match=r"\[teacher.chat\].*nothing says where it is"):
        run_of(world, METHOD, teacher={"chat": {}})
    with (
        ChatEndpoint() as endpoint,
        pytest.raises(EvidenceError, match="needs SAMPLED from the teacher, which offers CHUNKS"),
    ):
        train(run_of(world, {"name": "opd"}, output=str(tmp_path / "b"), teacher=changes(endpoint.url)["teacher"]))
    with pytest.raises(EvidenceError, match=r"needs CHUNKS from .* or a teacher that only writes"):
        train(run_of(world, METHOD, output=str(tmp_path / "c")))


def test_the_doctor_has_one_answer_audited(world: Path, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        checks = examine(omni(world, endpoint.url, tmp_path / "run"))
        assert 0 < len(endpoint.requests) <= 2 * 2
    assert not [check for check in checks if check.level != "ok"], checks
    said = {check.name: str(check) for check in checks}
    assert "serve writer" in said["servers"] and "audited" in said["one step"]


def test_its_whole_texts_can_be_learned_from_without_a_limit(world: Path, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        teacher, method = changes(endpoint.url)["teacher"], {"name": "seqkd"}
        folder = train(run_of(world, method, output=str(tmp_path / "run"), steps=1, teacher=teacher))
        assert records(folder)[0]["tokens"]["teacher"] > 0
        assert {len(body["messages"]) for body in endpoint.requests} == {1}
        limited = {**teacher, "chat": {"max_calls": 5}}
        with pytest.raises(ConfigError, match="counts continuations alone"):
            train(run_of(world, method, output=str(tmp_path / "limited"), steps=1, teacher=limited))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_student_in_half_precision_is_audited_as_well(dtype: str, world: Path, tmp_path: Path) -> None:
    with ChatEndpoint() as endpoint:
        run = run_of(world, output=str(tmp_path / "run"), student={"dtype": dtype}, **changes(endpoint.url))
        kept = records(train(run))
    assert all(record["terms"]["audited"]["tokens"] > 0 and record["gradient_norm"] > 0 for record in kept)
