"""The doctor for servers: each way in which one is unfit is found, named, and told apart from the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.mini import MiniServer
from tests.servers.proxy import Proxy, garbage
from tests.small_runs import run_of, write_models
from tests.tiny import byte_tokenizer, tiny_model
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.doctor import Check, examine
from tropd.errors import TeacherError
from tropd.run.start import train

QUICK = {"deadline_seconds": 1.5, "answer_seconds": 5.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"), teacher=tiny_model(seed=1, tied=True, sharp=4.0))


def run_at(world: Path, *urls: str, **changes: Any) -> Run:
    teacher = {"servers": list(urls), "server": QUICK, **changes.pop("teacher", {})}
    return run_of(world, output=str(world / "never"), teacher=teacher, **changes)


def of_servers(run: Run, **options: Any) -> dict[str, Check]:
    """By name; without weights, unless some prompts are asked for."""
    checks = examine(run, **{"num_prompts": 0, **options})
    return {check.name.removeprefix("servers: "): check for check in checks if check.name.startswith("servers")}


def errors(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if check.level == "error"]


class Cold(MiniServer):
    """Applies the request's temperature to the log-probabilities of texts."""

    def completions(self, body: dict[str, Any], request_id: str) -> dict[str, Any]:
        self.temperature = body["temperature"]
        return super().completions(body, request_id)


class Forgetful(MiniServer):
    """Has a cache of beginnings that forgets what a text was when it is asked about again."""

    known: frozenset[tuple[int, ...]] = frozenset()

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        seen, beginning = tuple(ids[:8]) in self.known, tuple(ids[:8])
        self.known = self.known | {beginning}
        found = super().logprobs(ids[:4] + [7] * 20 + ids[24:] if seen and len(ids) > 200 else ids)
        return found


class Noisy(MiniServer):
    """Rounds otherwise every time."""

    size = 0.06

    def logprobs(self, ids: list[int]) -> torch.Tensor:
        found = super().logprobs(ids)
        return (found + self.size * torch.randn_like(found)).log_softmax(-1)


class Noisier(Noisy):
    size = 0.6


def test_good_servers_pass_and_what_they_can_do_is_said(world: Path) -> None:
    teacher = world / "teacher"
    with MiniServer(teacher, max_logprobs=37) as a, MiniServer(teacher, max_logprobs=50) as b:
        found = of_servers(run_at(world, a.url, b.url), num_prompts=2, max_new_tokens=6)
    names = {"servers", "tokenizer", "top-k", "repeats", "replicas", "prefix cache", "temperature", "parity"}
    assert set(found) == names | {"own texts", "draws", "context", "speed"}
    assert {check.level for check in found.values()} == {"ok"}, found
    assert "the top-37, and the ids of all tokens come back; the method reads 8" in found["top-k"].found
    assert "they hold 256" in found["context"].found and "tokens per second" in found["speed"].found


@pytest.mark.parametrize(
    ("kind", "options", "name", "level", "words"),
    [
        (MiniServer, {"max_logprobs": 4}, "top-k", "error", "--max-logprobs 8, or set method.top_k = 4"),
        (MiniServer, {"max_model_len": 14}, "context", "warning", "--max-model-len"),
        (Cold, {}, "temperature", "warning", "--logprobs-mode raw_logprobs"),
        (Forgetful, {}, "prefix cache", "error", "--no-enable-prefix-caching"),
        (Noisy, {}, "repeats", "warning", "added to every log-ratio"),
        (Noisier, {}, "repeats", "error", "as much as distillation learns from"),
    ],
)
def test_an_unfit_server_is_told_why(
    world: Path, kind: type[MiniServer], options: dict[str, Any], name: str, level: str, words: str
) -> None:
    with kind(world / "teacher", **options) as server:
        found = of_servers(run_at(world, server.url))
    assert found[name].level == level and words in str(found[name])
    assert "speed" in found, "one finding hides no other"


def test_another_model_differs_from_the_weights_at_hand(world: Path, other_folder: Path) -> None:
    with MiniServer(other_folder) as other, MiniServer(world / "teacher") as server:
        found = of_servers(run_at(world, other.url), num_prompts=1)
        assert errors(found) == ["parity"] and "what is served" in found["parity"].advice
        assert errors(of_servers(run_at(world, server.url, other.url))) == ["replicas"]


def test_whoever_does_not_answer_as_a_server_is_one_finding(world: Path) -> None:
    with MiniServer(world / "teacher") as server, Proxy(server.url, garbage) as proxy:
        assert errors(of_servers(run_at(world, proxy.url))) == ["tokenizer"]
        other = byte_tokenizer()
        other.add_tokens(["fox jumps"])
        server.tokenizer = other
        assert "cuts a text otherwise" in of_servers(run_at(world, server.url))["tokenizer"].found
    dead = of_servers(run_at(world, server.url, teacher={"server": {"deadline_seconds": 0.3}}))
    assert errors(dead) == ["servers"] and "does not answer" in dead["servers"].found
    open_ = of_servers(run_at(world, "http://192.0.2.1:9", teacher={"server": {"deadline_seconds": 0.1}}))
    assert errors(open_) == ["servers"] and "plain http" in open_["security"].found


def test_the_command_says_it_in_a_table_and_by_its_exit_code(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, code in ((MiniServer, 0), (Forgetful, 2)):
        with kind(world / "teacher") as server:
            path = world / "examined.toml"
            path.write_text(run_at(world, server.url).dump())
            assert main(["doctor", str(path), "--sample-prompts", "0", "--json"]) == code
        found = json.loads(capsys.readouterr().out)
        assert found["exit_code"] == code and any(c["name"] == "servers: prefix cache" for c in found["checks"])


def test_training_does_not_begin_on_a_server_whose_scores_cannot_be_trusted(world: Path) -> None:
    with Forgetful(world / "teacher") as server, pytest.raises(TeacherError, match="prefix cache: .*as much as"):
        train(run_at(world, server.url))
    assert not (world / "never").exists() or not (world / "never" / "records.jsonl").exists()
