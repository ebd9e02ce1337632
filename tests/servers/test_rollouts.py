"""Rollouts from servers: the student's own texts, and no text from other weights than the student's."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.servers.mini import MiniServer, Refusal
from tests.small_runs import run_of, save_model, write_models
from tests.tiny import VOCAB, byte_tokenizer, tiny_model
from tropd.checkpoints.export import export_untied
from tropd.config.models import LoraConfig, ServerConfig
from tropd.errors import ConfigError, DataError, EngineError, EngineOutOfSync
from tropd.model.loading import add_adapter
from tropd.monitoring.records import read_records
from tropd.rollout.transformers import TransformersEngine
from tropd.rollout.vllm import VllmEngine
from tropd.run.start import train
from tropd.testing import check_engine
from tropd.types import Finish, Request, Sampling

REQUESTS = [Request(token_ids=(72, 101, 108 + n), max_new_tokens=3 + 4 * n, seed=n - 5) for n in range(4)]


@pytest.fixture
def student() -> Any:
    return tiny_model(seed=3, sharp=4.0, tied=True)


def engine_of(model: Any, folder: Path, *servers: MiniServer, **options: Any) -> VllmEngine:
    settings = ServerConfig(deadline_seconds=2.0)
    tokenizer, urls = byte_tokenizer(), [server.url for server in servers]
    return VllmEngine(
        urls, settings, model=model, tokenizer=tokenizer, folder=folder / "w", vocab_size=VOCAB, **options
    )


def nudge(model: Any, size: float) -> None:
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn_like(parameter)


def test_texts_of_two_servers_are_those_of_this_process(student: Any, folder: Path, tmp_path: Path) -> None:
    with MiniServer(folder) as first, MiniServer(folder) as second:
        engine = engine_of(student, tmp_path, first, second)
        for version in (0, 5):
            nudge(student, 0.1)
            engine.sync(version)
            expected = TransformersEngine(student, version=version).generate(REQUESTS)
            for own, text in zip(expected, engine.generate(REQUESTS), strict=True):
                assert (text.token_ids, text.finish, text.policy_version) == (own.token_ids, own.finish, (version,) * 2)
                assert text.behavior_logprobs == text.model_logprobs == pytest.approx(own.behavior_logprobs, abs=1e-4)
        stop = expected[3].token_ids[2]
        (stopped,) = engine.generate([replace(REQUESTS[3], stop_ids=(stop,))])
        assert stopped.finish is Finish.STOP and stopped.token_ids[-1] == stop
        assert min(engine.pool.tally.by_server.values()) > 0
        engine.close()


def test_servers_load_weights_at_the_same_time(student: Any, folder: Path, tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=20.0)

    class Patient(MiniServer):
        """Loads when both have been asked to."""

        def reload(self, body: dict[str, Any]) -> dict[str, Any]:
            both.wait()
            return super().reload(body)

    with Patient(folder) as first, Patient(folder) as second:
        engine = engine_of(student, tmp_path, first, second)
        engine.sync(1)
        engine.close()
    assert not both.broken


def test_a_server_that_refuses_the_weights_leaves_the_others_their_time_to_read_them(
    student: Any, folder: Path, tmp_path: Path
) -> None:
    refused, read = threading.Event(), []

    class Refusing(MiniServer):
        def reload(self, body: dict[str, Any]) -> dict[str, Any]:
            refused.set()
            raise Refusal(400, f"no room on {self.url}")

    class Slow(MiniServer):
        def reload(self, body: dict[str, Any]) -> dict[str, Any]:
            assert refused.wait(20.0)
            time.sleep(0.5)  # long after the other's refusal has arrived
            read.append(Path(body["kwargs"]["weights_path"]).exists())
            return super().reload(body)

    with Refusing(folder) as first, Slow(folder) as second, Refusing(folder) as third:
        engine = engine_of(student, tmp_path, first, second, kept=False)
        with pytest.raises(EngineError, match=f"no room on {first.url}"):
            engine.sync(1)
        engine.close()
        assert read == [True]
        both = f"2 of 3 servers failed.*no room on {first.url}.*no room on {third.url}"
        engine = engine_of(student, tmp_path, first, second, third)
        with pytest.raises(EngineError, match=both):
            engine.sync(1)


def test_the_engine_keeps_the_promises_of_engines(student: Any, folder: Path, tmp_path: Path) -> None:
    with MiniServer(folder) as server:
        check_engine(engine_of(student, tmp_path, server), vocab_size=VOCAB)


def test_the_first_texts_are_the_students_whatever_the_server_started_with(
    student: Any, folder: Path, tmp_path: Path
) -> None:
    with MiniServer(folder) as server:
        texts = engine_of(student, tmp_path, server).generate(REQUESTS)
    assert [t.token_ids for t in texts] == [t.token_ids for t in TransformersEngine(student).generate(REQUESTS)]


def export_tied(model: Any, tokenizer: Any, folder: Path) -> Path:
    return save_model(folder, model)


def test_a_tied_head_that_stays_behind_is_caught_and_an_untied_export_has_none(student: Any, tmp_path: Path) -> None:
    served = save_model(tmp_path / "tied", student)
    nudge(student, 0.1)
    with MiniServer(served, keeps_tied_head=True) as server:
        with pytest.raises(EngineOutOfSync, match=r"trainer -\d.*\n  server  -\d.*\n.*nats apart") as caught:
            engine_of(student, tmp_path, server, export=export_tied).sync(1)
        assert str(tmp_path / "w") in str(caught.value)
        engine_of(student, tmp_path, server).sync(1)


def test_an_untied_export_has_the_same_numbers_and_a_head_of_its_own(student: Any, tmp_path: Path) -> None:
    folder = export_untied(student, byte_tokenizer(), tmp_path / "untied")
    assert "lm_head.weight" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    read: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert read.lm_head.weight is not read.model.embed_tokens.weight
    ids = torch.tensor([[5, 9, 7]])
    assert torch.equal(read(ids).logits, student(ids).logits) and student.config.tie_word_embeddings


def test_an_update_that_does_not_arrive_is_noticed_even_when_it_is_small(
    student: Any, folder: Path, tmp_path: Path
) -> None:
    with MiniServer(folder) as server:
        engine = engine_of(student, tmp_path, server, sync_nats=1.0)
        engine.sync(0)
        server.ignores_reload = True
        nudge(student, 1e-4)
        with pytest.raises(EngineOutOfSync, match="took the new weights without a change"):
            engine.sync(1)


def test_a_server_that_came_back_with_old_weights_is_given_the_new_ones(
    student: Any, folder: Path, tmp_path: Path
) -> None:
    with MiniServer(folder) as server:
        old = server.model
        engine = engine_of(student, tmp_path, server)
        expected = [t.token_ids for t in engine.generate(REQUESTS)]
        server.model = old
        assert [t.token_ids for t in engine.generate(REQUESTS)] == expected
        server.model, server.ignores_reload = old, True
        with pytest.raises(EngineOutOfSync, match="does not compute with the student's weights"):
            engine.generate(REQUESTS)


def test_an_adapter_is_sent_alone_and_under_a_new_name(student: Any, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", student)
    model = add_adapter(student, LoraConfig(rank=2), seed=0)
    with MiniServer(base) as server:
        engine = engine_of(model, tmp_path, server)
        for version in (0, 1):
            nudge_adapter(model)
            engine.sync(version)
            expected = TransformersEngine(model).generate(REQUESTS)
            assert [t.token_ids for t in engine.generate(REQUESTS)] == [t.token_ids for t in expected]
            assert list(server.adapters) == [f"tropd-{version}"]
        assert not (tmp_path / "w" / "model.safetensors").exists()
        server.adapters.clear()  # as after a restart
        assert [t.token_ids for t in engine.generate(REQUESTS)] == [t.token_ids for t in expected]


def nudge_adapter(model: Any) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter += 0.1 * torch.randn_like(parameter)


def test_what_servers_cannot_do_is_refused(student: Any, folder: Path, tmp_path: Path) -> None:
    with MiniServer(folder) as server:
        engine = engine_of(student, tmp_path, server)
        (shaped,) = engine.generate([Request(token_ids=(5,), max_new_tokens=4, seed=1, sampling=Sampling(top_p=0.9))])
        assert len(shaped.token_ids) == 4 and shaped.behavior_logprobs == shaped.model_logprobs == ()
        with pytest.raises(DataError, match="the servers hold 256"):
            engine.generate([Request(token_ids=(5,), max_new_tokens=256, seed=1)])
        server.name = "renamed"
        with pytest.raises(EngineError, match="does not exist"):
            engine.generate(REQUESTS)
        write_models(tmp_path)
        rollout = {"servers": [server.url], "sampling": {"temperature": 0.7}}
        with pytest.raises(ConfigError, match="temperature 1 without truncation"):
            train(run_of(tmp_path, rollout=rollout))
        with pytest.raises(ConfigError, match="vLLM servers only"):
            train(run_of(tmp_path, rollout={"servers": [server.url], "server": {"kind": "openai"}}))


def test_a_run_with_rollouts_from_a_server_is_the_run_without(tmp_path: Path) -> None:
    write_models(tmp_path, tied=True)
    with MiniServer(tmp_path / "student") as server:
        found = [
            read_records(train(run_of(tmp_path, output=str(tmp_path / name), rollout=rollout)) / "records.jsonl").steps
            for name, rollout in (("here", {}), ("there", {"servers": [server.url]}))
        ]
    for here, there in zip(*found, strict=True):
        assert there.tokens == here.tokens and there.loss == pytest.approx(here.loss, abs=1e-4)
