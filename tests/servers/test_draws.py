"""A server with the right weights and log-probabilities that draws otherwise than it was asked to is refused, or
raises an alarm, before its texts have taught for long; an evaluation on it is no number."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.mini import MiniServer
from tests.small_runs import run_of, write_models
from tests.tiny import tiny_model
from tropd.errors import EngineError, TeacherError, TrainingDiverged
from tropd.rollout import draws
from tropd.rollout.transformers import TransformersEngine
from tropd.run.start import train
from tropd.types import Request, Sampling

Body = dict[str, Any]
NUMBERS = itertools.count(1)
WAYS: dict[str, Callable[[Body], Body]] = {
    "at temperature 0.7": lambda body: body | {"temperature": 0.7},
    "at temperature 2": lambda body: body | {"temperature": 2.0},
    "greedily": lambda body: body | {"temperature": 0.0},
    "with top_p = 0.9": lambda body: body | {"top_p": 0.9},
    "with top_k = 20": lambda body: body | {"top_k": 20},
    "when it should not": lambda body: body | {"temperature": body["temperature"] or 1.0},
    "with one seed for all": lambda body: body | {"seed": 7},
    "with seeds of its own": lambda body: body | {"seed": next(NUMBERS)},
}
AT_ONCE = ("greedily", "with one seed for all", "with seeds of its own")
LARGE = {"num_prompts": 4, "num_rollouts": 4, "max_new_tokens": 24}


class Drawer(MiniServer):
    """Draws in its own way once it has written `begins` texts."""

    def __init__(self, folder: Path, way: str, begins: int = 0, **options: Any) -> None:
        super().__init__(folder, **options)
        self.way, self.begins, self.written = WAYS[way], begins, 0

    def _write(self, ids: list[int], body: Body) -> Any:
        self.written += 1
        return super()._write(ids, self.way(body) if self.written > self.begins else body)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("world"), teacher=tiny_model(seed=1, tied=True))
    (folder / "held_out.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n}=", "answer": "0"}) + "\n" for n in range(12))
    )
    return folder


def run_at(world: Path, folder: Path, **changes: Any) -> Any:
    return run_of(world, output=str(folder / "run"), **changes)


@pytest.mark.parametrize("way", [way for way in WAYS if way != "when it should not"])
def test_a_rollout_server_that_draws_otherwise_ends_the_run(world: Path, tmp_path: Path, way: str) -> None:
    """Some are refused when they are met; whoever begins later is found by the rollouts of a few steps."""
    if way in AT_ONCE:
        with (
            Drawer(world / "student", way) as server,
            pytest.raises(EngineError, match="looks drawn|All are|ignores s"),
        ):
            train(run_at(world, tmp_path, rollout={"servers": [server.url]}))
    if way == "with seeds of its own":
        return  # its texts are as good as others: only a second run would show it
    with Drawer(world / "student", way, begins=40) as server:
        rollout = {"servers": [server.url], **LARGE}
        with pytest.raises(TrainingDiverged, match="the servers of the student|two answers to one prompt"):
            train(run_of(world, output=str(tmp_path / "later"), steps=12, rollout=rollout))


@pytest.mark.parametrize("way", ["at temperature 0.7", "at temperature 2", "with top_p = 0.9", "greedily"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.3, "top_p": 0.97}])
def test_an_evaluation_on_such_a_server_is_refused(world: Path, tmp_path: Path, way: str, sampling: Body) -> None:
    data = {"path": str(world / "held_out.jsonl")}
    evaluation = {"data": data, "num_samples": 4, "max_new_tokens": 24, "sampling": sampling}
    with Drawer(world / "student", way, begins=33) as server:
        run = run_at(world, tmp_path, rollout={"servers": [server.url]}, evaluation=evaluation)
        with pytest.raises(EngineError, match=r"look drawn .* so its score is another student's"):
            train(run)
    assert not (tmp_path / "run" / "evaluations").exists()


def test_a_greedy_evaluation_that_is_drawn_is_refused(world: Path, tmp_path: Path) -> None:
    evaluation = {"data": {"path": str(world / "held_out.jsonl")}, "num_samples": 1, "greedy": True}
    with Drawer(world / "student", "when it should not", begins=33) as server:
        run = run_at(
            world, tmp_path, rollout={"servers": [server.url]}, evaluation={**evaluation, "max_new_tokens": 24}
        )
        with pytest.raises(EngineError, match=r"drawn with Sampling\(temperature=0.0.* look drawn"):
            train(run)


def test_servers_that_write_ahead_show_how_they_draw_at_every_update(world: Path, tmp_path: Path) -> None:
    with Drawer(world / "student", "at temperature 0.7", begins=60) as server:
        rollout = {"servers": [server.url], "staleness": 1}
        with pytest.raises(EngineError, match="By these, and those before, what the servers of the student write"):
            train(run_at(world, tmp_path, steps=60, rollout=rollout, optimizer={"learning_rate": 1e-5}))


def test_a_teachers_server_that_draws_its_texts_otherwise_ends_the_run(world: Path, tmp_path: Path) -> None:
    method = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 0.9}, "beta": 0.1}
    with Drawer(world / "teacher", "at temperature 0.7", begins=8) as server:
        how = {"rollout": {**LARGE, "num_prompts": 10}, "teacher": {"servers": [server.url]}}
        run = run_of(world, method, output=str(tmp_path / "run"), steps=5, **how)
        with pytest.raises(TrainingDiverged, match="the servers of the teacher write is not drawn .* temperature 0.7"):
            train(run)


def test_a_teachers_text_with_a_token_that_the_student_lacks_is_an_error_in_words(world: Path, tmp_path: Path) -> None:
    class Foreign(MiniServer):
        def completions(self, body: Body, request_id: str) -> Body:
            found = super().completions(body, request_id)
            if body.get("logprobs") is None and body.get("prompt_logprobs") is None:
                found["choices"][0]["token_ids"][0] = 5000
            return found

    words = "teacher default wrote token 5000, but student and teacher share 262"
    with Foreign(world / "teacher") as server, pytest.raises(TeacherError, match=words):
        train(run_at(world, tmp_path, teacher={"servers": [server.url]}))


def test_honest_servers_raise_nothing_in_many_small_steps(world: Path, tmp_path: Path) -> None:
    data = {"path": str(world / "held_out.jsonl")}
    evaluation = {"data": data | {"limit": 4}, "num_samples": 2, "greedy": True, "every": 5, "max_new_tokens": 16}
    with MiniServer(world / "student") as student, MiniServer(world / "teacher") as teacher:
        rollout = {"servers": [student.url], "num_prompts": 1, "num_rollouts": 2, "max_new_tokens": 6}
        changes = {"rollout": rollout, "teacher": {"servers": [teacher.url], "dtype": "float32"}}
        folder = train(run_at(world, tmp_path, steps=15, evaluation=evaluation, **changes))
    lines = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()][1:]
    assert len(lines) == 15 and not any("draws" in alarm or "equal" in alarm for x in lines for alarm in x["alarms"])
    for line in lines:
        assert line["probes"]["draws/surprise"] == pytest.approx(line["probes"]["draws/entropy"], abs=4.0)
        assert any(name.startswith("draws/teacher/") for name in line["probes"])


@pytest.mark.parametrize("sharp", [4.0, 16.0, 40.0])
def test_evidence_comes_by_chance_as_rarely_as_is_said(sharp: float) -> None:
    """Looks at 16 tokens each, flat and sharp models: evidence above ln 100 comes at most once in a hundred looks."""
    model, looks = tiny_model(seed=2, sharp=sharp), 200
    requests = [Request(token_ids=(5, 6, n % 200), max_new_tokens=16, seed=n) for n in range(looks)]
    texts = TransformersEngine(model).generate(requests)
    found: dict[str, list[float]] = {}
    for request, text in zip(requests, texts, strict=True):
        ids = torch.tensor([[*request.token_ids, *text.token_ids]])
        with torch.no_grad():
            logprobs_TV = model(ids).logits[0, 2:-1].log_softmax(-1)
        drawn_T, top = torch.tensor(text.token_ids), logprobs_TV.topk(8)
        own_T = logprobs_TV.gather(1, drawn_T[:, None])[:, 0]
        several = (
            draws.evidence(logprobs_TV, drawn_T),
            {f"{name}, of 8": x for name, x in draws.evidence_of_rows(drawn_T, own_T, top.indices, top.values).items()},
        )
        for name, nats in itertools.chain(*(one.items() for one in several)):
            found.setdefault(name, []).append(nats)
    assert len(found) == 15
    for name, column in found.items():
        assert sum(nats > 4.6 for nats in column) <= 6, name  # 2 are expected at most; 7 come once in 200
        assert sum(column) < 0, f"{name}: on average evidence speaks for the sampler that draws"


def test_every_way_is_found_from_so_many_tokens() -> None:
    """Of a model with 4.1 nats of entropy: what docs/servers.md says."""
    model = tiny_model(seed=1)
    needed = {}
    for name, sampling in (
        ("temperature 0.7", Sampling(temperature=0.7)),
        ("temperature 0.9", Sampling(temperature=0.9)),
        ("temperature 1.1", Sampling(temperature=1.1)),
        ("temperature 1.5", Sampling(temperature=1.5)),
        ("top_p 0.9", Sampling(top_p=0.9)),
        ("top_p 0.95", Sampling(top_p=0.95)),
        ("top_k 20", Sampling(top_k=20)),
        ("greedy", Sampling(temperature=0.0)),
    ):
        requests = [Request(token_ids=(5, 6, n), max_new_tokens=32, seed=n, sampling=sampling) for n in range(64)]
        lots = []
        for request, text in zip(requests, TransformersEngine(model).generate(requests), strict=True):
            with torch.no_grad():
                ids = torch.tensor([[*request.token_ids, *text.token_ids]])
                logprobs_TV = model(ids).logits[0, 2:-1].log_softmax(-1)
            lots.append(draws.evidence(logprobs_TV, torch.tensor(text.token_ids)))
        best = max(draws.total(lots).values())
        needed[name] = round(draws.ENOUGH / best * 32 * len(lots)) if best > 0 else None
    print(needed)
    assert all(number is not None for number in needed.values()), needed
    assert needed["greedy"] < 20 and needed["temperature 0.7"] < 200 and max(needed.values()) < 3000, needed
