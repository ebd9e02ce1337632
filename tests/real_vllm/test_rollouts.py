"""Real vLLM writes the rollouts: weights arrive whole, a tied head that stays behind is caught, a run goes through."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file

from tests.one_step import step_of, write
from tests.real_vllm.conftest import DEV, tiny_student
from tests.real_vllm.vllm import Server
from tests.servers.test_rollouts import export_tied, nudge
from tests.small_runs import run_of, save_model, write_models
from tests.tiny import VOCAB, byte_tokenizer
from tropd.config.models import LoraConfig, ServerConfig
from tropd.config.run import Run
from tropd.errors import EngineOutOfSync
from tropd.model.loading import add_adapter
from tropd.monitoring.records import read_records
from tropd.rollout.vllm import VllmEngine
from tropd.run.start import assemble, train
from tropd.testing import check_engine
from tropd.types import Finish, Request

pytestmark = pytest.mark.server
REQUESTS = [Request(token_ids=(72, 101, 108 + n), max_new_tokens=3 + 4 * n, seed=n - 2) for n in range(4)]


def engine_of(model: Any, folder: Path, server: Server, **options: Any) -> VllmEngine:
    options |= {"model": model, "tokenizer": byte_tokenizer(), "folder": folder / "weights", "vocab_size": VOCAB}
    return VllmEngine([server.url], ServerConfig(), **options)


def logprobs_here(model: Any, request: Request, token_ids: tuple[int, ...]) -> torch.Tensor:
    ids = [*request.token_ids, *token_ids]
    with torch.no_grad():
        rows_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)[len(request.token_ids) - 1 : -1]
    return rows_TV.gather(1, torch.tensor(token_ids)[:, None])[:, 0]


def check_texts(engine: VllmEngine, model: Any, version: int) -> None:
    texts = engine.generate(REQUESTS)
    for request, text in zip(REQUESTS, texts, strict=True):
        assert (len(text.token_ids), text.finish) == (request.max_new_tokens, Finish.LENGTH)
        assert text.policy_version == (version, version)
        expected_T = logprobs_here(model, request, text.token_ids)
        torch.testing.assert_close(torch.tensor(text.behavior_logprobs), expected_T, rtol=0, atol=1e-4)
    again = engine.generate(REQUESTS[::-1])[::-1]
    assert [t.token_ids for t in again] == [t.token_ids for t in texts]


def test_an_untied_student_is_on_the_server_after_every_update(untied_server: Server, tmp_path: Path) -> None:
    model = tiny_student()
    engine = engine_of(model, tmp_path, untied_server)
    for version in range(3):
        nudge(model, 0.02)
        engine.sync(version)
        check_texts(engine, model, version)
    check_engine(engine, vocab_size=VOCAB)


def test_a_tied_head_that_stays_behind_is_caught_and_an_untied_export_has_none(
    vllm_server: Callable[..., Server], tmp_path: Path
) -> None:
    model = tiny_student()
    server = vllm_server(save_model(tmp_path / "tied", model), environment=DEV)
    nudge(model, 0.05)
    with pytest.raises(EngineOutOfSync, match=r"trainer -\d.*\n  server  -\d.*\n.*nats apart"):
        engine_of(model, tmp_path, server, export=export_tied).sync(1)
    engine = engine_of(model, tmp_path, server)
    engine.sync(1)
    check_texts(engine, model, 1)


def test_an_adapter_is_on_the_server_after_every_update(vllm_server: Callable[..., Server], tmp_path: Path) -> None:
    base = tiny_student()
    folder = save_model(tmp_path / "base", base)
    model = add_adapter(base, LoraConfig(rank=8), seed=0)
    server = vllm_server(
        folder,
        flags=("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
        environment={"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"},
    )
    engine = engine_of(model, tmp_path, server)
    for version in range(2):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter += 0.05 * torch.randn_like(parameter)
        engine.sync(version)
        check_texts(engine, model, version)


def test_a_run_has_teacher_and_rollouts_on_two_servers(
    untied_server: Server, teacher_server: Server, teacher_folder: Path, tmp_path: Path
) -> None:
    """Every step's rollouts have the log-probabilities of the weights that are trained in it."""
    here = run_on(tmp_path, untied_server, teacher_folder)
    run = run_on(tmp_path, untied_server, teacher_folder, teacher={"servers": [teacher_server.url]})
    records = read_records(train(run) / "records.jsonl").steps
    assert [record.step for record in records] == [0, 1, 2]
    for record in records:
        assert record.tokens["student"] > 0 and record.tokens["teacher"] > 0 and record.gradient_norm > 0
        assert record.probes["mismatch/behavior_max"] < 1e-3
        assert versions_of(tmp_path / "run", record.step) == {(record.step, record.step)}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("student", "run/model"))
    assert max(float((before[name] - after[name]).abs().max()) for name in before) > 0.01, "a sync left out would show"

    ahead = {"rollout": {"staleness": 1}, "output": str(tmp_path / "ahead")}
    run_ahead = run_on(tmp_path, untied_server, teacher_folder, teacher={"servers": [teacher_server.url]}, **ahead)
    records = read_records(train(run_ahead) / "records.jsonl").steps
    assert [versions_of(tmp_path / "ahead", step) for step in range(3)] == [{(0, 0)}, {(0, 0)}, {(1, 1)}]
    assert [record.probes["staleness/max"] for record in records] == [0, 1, 1]

    near, far = assemble(here, tmp_path), assemble(run, tmp_path)
    rollouts = write(far)
    expected, found = step_of(near, rollouts), step_of(far, rollouts)
    assert found.sums.loss == pytest.approx(expected.sums.loss, abs=1e-4)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-3, atol=1e-4)


def versions_of(directory: Path, step: int) -> set[tuple[int, ...]]:
    """Of the weights that wrote the rollouts of a step, where the student wrote any of them."""
    rows = parquet.read_table(directory / "rollouts" / f"step_{step:06d}.parquet").to_pylist()
    return {tuple(row["policy_version"]) for row in rows if "student" in row["authors"]}


def run_on(folder: Path, student: Server, teacher_folder: Path, **changes: Any) -> Run:
    """A TrOPD run whose student is on a server; without changes its teacher is in this process."""
    write_models(folder)
    save_model(folder / "student", tiny_student())
    changes["teacher"] = {"path": str(teacher_folder), **changes.pop("teacher", {})}
    changes["rollout"] = {"servers": [student.url], **changes.pop("rollout", {})}
    return run_of(folder, optimizer={"learning_rate": 1e-2}, **changes)
