"""A teacher with another tokenizer on a server: it is asked in its own tokens, and the run is that of this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bridge.test_bridged import bridged, world_of
from tests.servers.mini import MiniServer
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.monitoring.records import read_records
from tropd.run.start import resume, train

CLIPPED = {"name": "tropd", "outlier": "clip", "beta": 1.0, "prefix": {"start": 0.5}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), "unigram")


def run_at(world: Path, output: Path, servers: list[str], **changes: Any) -> Run:
    teacher = {"servers": servers, "score_cache": bool(servers)}
    return bridged(world, output=str(output), teacher=teacher, method=CLIPPED, checkpoint={"every": 1}, **changes)


def test_a_teacher_across_a_bridge_scores_and_writes_on_a_server_as_in_this_process(
    world: Path, tmp_path: Path
) -> None:
    near = train(run_at(world, tmp_path / "near", []))
    with MiniServer(world / "other") as server:
        far = train(run_at(world, tmp_path / "far", [server.url]))
        asked = [json.dumps(body) for body in server.requests]
        again = train(run_at(world, tmp_path / "again", [server.url], steps=1))
        resume(again, steps=2)
        checks = examine(run_at(world, tmp_path / "x", [server.url]), num_prompts=8, max_new_tokens=12)
    assert any('"max_tokens": 12' in body for body in asked), "the server wrote the prefixes too"
    for a, b in zip(*(read_records(folder / "records.jsonl").steps for folder in (near, far)), strict=True):
        assert a.loss == pytest.approx(b.loss, abs=1e-4) and a.loss != 0
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3) and a.tokens == b.tokens
    files = [(folder / "model" / "model.safetensors").read_bytes() for folder in (far, again)]
    assert files[0] == files[1] and (far / "teacher_scores.sqlite").exists()
    assert {x.name for x in checks if x.level == "error"} <= {"teacher"}  # a random one knows nothing, says the doctor
