"""A teacher on real vLLM says what its model says in this process, through faults and a crash, and trains alike."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.real_vllm.conftest import tiny_student
from tests.real_vllm.vllm import Server
from tests.servers.proxy import Fault, Proxy, Swapped, corrupt, cut, delayed, garbage, huge, status, truncated
from tests.small_runs import run_of, save_model
from tests.tiny import VOCAB
from tropd.config.models import ServerConfig
from tropd.doctor import examine
from tropd.errors import TeacherError
from tropd.monitoring.records import read_records
from tropd.objective.evidence import Needs
from tropd.run.start import train
from tropd.teachers.local import LocalTeacher
from tropd.teachers.meeting import canary_of
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.testing import check_teacher, some_rollouts
from tropd.types import TeacherScores

pytestmark = pytest.mark.server
BOTH = Needs.SAMPLED | Needs.TOPK
TOLERANCE = 1e-4
"""Nats between a server in float32 and this process, as docs/servers.md states."""


def teacher_at(url: str, **limits: float) -> ServerTeacher:
    settings = ServerConfig(**{"deadline_seconds": 10.0, "answer_seconds": 30.0, **limits})  # type: ignore[arg-type]
    return ServerTeacher([url], settings, vocab_size=VOCAB, canary=canary_of(range(40, 60), VOCAB), top_k=8)


def local(folder: Path) -> LocalTeacher:
    return LocalTeacher(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), vocab_size=VOCAB)


def same(found: list[TeacherScores], expected: list[TeacherScores]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.topk_logprobs_TK is not None and b.topk_logprobs_TK is not None
        torch.testing.assert_close(a.logprobs_T, b.logprobs_T, rtol=0, atol=TOLERANCE)
        torch.testing.assert_close(a.topk_logprobs_TK, b.topk_logprobs_TK, rtol=0, atol=TOLERANCE)


def test_it_keeps_the_promises_of_teachers(teacher_server: Server) -> None:
    check_teacher(teacher_at(teacher_server.url), vocab_size=VOCAB, top_k=8)


def test_scores_are_those_of_the_same_model_in_this_process(teacher_server: Server, teacher_folder: Path) -> None:
    rollouts = some_rollouts(VOCAB, [(1, 1), (3, 40), (60, 120), (17, 0), (9, 200)])
    found = teacher_at(teacher_server.url).score(ScoreRequest(rollouts, BOTH, top_k=64))
    same(found, local(teacher_folder).score(ScoreRequest(rollouts, BOTH, top_k=64)))


@pytest.mark.parametrize(
    "fault",
    [Swapped(), corrupt, cut, truncated, garbage, huge, status(429), status(503), delayed(3.0)],
    ids="swapped corrupt cut truncated garbage huge 429 503 slow".split(),  # noqa: SIM905
)
def test_spoiled_answers_are_asked_again_or_end_the_step(
    teacher_server: Server, teacher_folder: Path, fault: Fault
) -> None:
    rollouts = some_rollouts(VOCAB)
    with Proxy(teacher_server.url) as proxy:
        teacher = teacher_at(proxy.url, deadline_seconds=4.0, answer_seconds=1.5)
        begun = proxy.posts
        proxy.fault = lambda n, request, reply: fault(n, request, reply) if n - begun in (1, 3) else reply
        same(
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=8)),
            local(teacher_folder).score(ScoreRequest(rollouts, BOTH, top_k=8)),
        )
        assert proxy.posts > begun + 4
        proxy.fault = fault
        with pytest.raises(TeacherError):
            teacher.score(ScoreRequest(rollouts, BOTH, top_k=8))


def test_a_server_that_crashes_and_comes_back_is_waited_for(
    vllm_server: Callable[..., Server], teacher_server: Server, teacher_folder: Path
) -> None:
    """Whoever asks this address afterwards asks the one that came back."""
    rollouts = some_rollouts(VOCAB)
    teacher = teacher_at(teacher_server.url, deadline_seconds=240.0)
    teacher_server.kill()
    found: list[TeacherScores] = []
    asking = threading.Thread(
        target=lambda: found.extend(teacher.score(ScoreRequest(rollouts, BOTH, top_k=8))), daemon=True
    )
    asking.start()
    port = int(teacher_server.url.rsplit(":", 1)[1])
    vllm_server(teacher_folder, flags=("--max-logprobs", "64"), port=port)
    asking.join(60)
    same(found, local(teacher_folder).score(ScoreRequest(rollouts, BOTH, top_k=8)))
    assert teacher.pool.tally.failures > 0


@pytest.fixture
def world(tmp_path: Path, teacher_folder: Path) -> Path:
    """Student, teacher, and prompts that bring the teacher's text for TrOPD's prefixes."""
    save_model(tmp_path / "student", tiny_student())
    (tmp_path / "teacher").symlink_to(teacher_folder)
    said = {n: f"{n} is what comes after {n - 1}" for n in range(20)}
    turns = [({"role": "user", "content": f"{n}="}, {"role": "assistant", "content": text}) for n, text in said.items()]
    rows = [{"messages": turn, "answer": "0"} for turn in turns]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return tmp_path


def steps_of(world: Path, name: str, **changes: Any) -> list[Any]:
    changes = {"steps": 4, "optimizer": {"learning_rate": 1e-3}, **changes}
    return read_records(train(run_of(world, output=str(world / name), **changes)) / "records.jsonl").steps


def test_a_run_with_teacher_and_rollouts_on_two_servers_is_the_run_with_the_teacher_in_this_process(
    world: Path, teacher_server: Server, untied_server: Server
) -> None:
    """The same tokens: rollouts come from the same server, weights and seeds, prefixes from the data."""
    data = {"path": str(world / "data.jsonl"), "last_assistant": "prefix"}
    rollout = {"servers": [untied_server.url]}
    far = steps_of(world, "far", data=data, rollout=rollout, teacher={"servers": [teacher_server.url]})
    near = steps_of(world, "near", data=data, rollout=rollout)
    for a, b in zip(far, near, strict=True):
        assert a.tokens == b.tokens and a.tokens["teacher"] > 0 and a.tokens["student"] > 0
        assert a.loss == pytest.approx(b.loss, abs=TOLERANCE) and a.loss != 0
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_the_teacher_writes_prefixes_on_the_server_as_well(world: Path, teacher_server: Server) -> None:
    for record in steps_of(world, "texts", steps=2, teacher={"servers": [teacher_server.url]}):
        assert record.tokens["teacher"] > 0 and record.gradient_norm > 0


def test_the_doctor_finds_nothing_wrong_with_it(world: Path, teacher_server: Server) -> None:
    run = run_of(world, output=str(world / "never"), teacher={"servers": [teacher_server.url]})
    checks = {check.name: check for check in examine(run, num_prompts=1) if check.name.startswith("servers")}
    assert len(checks) == 11 and {check.level for check in checks.values()} == {"ok"}, checks
    assert "the top-64, and" in checks["servers: top-k"].found
