"""Real vLLM goes through its states of sleep, and has the weights that it is given after every one of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.real_vllm.conftest import DEV, tiny_student
from tests.real_vllm.test_rollouts import check_texts, engine_of, run_on, versions_of
from tests.real_vllm.vllm import Server
from tests.servers.test_rollouts import nudge, nudge_adapter
from tests.small_runs import save_model
from tropd.config.models import LoraConfig
from tropd.model.loading import add_adapter
from tropd.monitoring.records import read_records
from tropd.run.start import train

pytestmark = pytest.mark.server
GRADER = f"{__name__}:grade_asleep"


def asleep(url: str) -> bool:
    return httpx.get(f"{url}/is_sleeping", trust_env=False).json()["is_sleeping"]


def test_weights_are_there_after_every_sleep(untied_server: Server, tmp_path: Path) -> None:
    model, url = tiny_student(), untied_server.url
    engine = engine_of(model, tmp_path, untied_server, sleeps=True)
    assert asleep(url) and [note for note in engine.notes if "computes on a CPU" in note]
    for version in range(2):
        nudge(model, 0.02)
        engine.sync(version)
        assert not asleep(url)
        check_texts(engine, model, version)
        engine.rest()
        assert asleep(url)
    body = {"model": untied_server.name, "prompt": [72, 101], "max_tokens": 1}
    with pytest.raises(httpx.ReadTimeout):  # it waits for whoever wakes it
        httpx.post(f"{url}/v1/completions", json=body, timeout=2, trust_env=False)
    check_texts(engine, model, 1)
    engine.rest()
    check_texts(engine_of(model, tmp_path, untied_server), model, 0)
    assert not asleep(url), "an engine that does not sleep wakes whom it finds asleep"


def test_an_adapter_is_there_after_every_sleep(vllm_server: Callable[..., Server], tmp_path: Path) -> None:
    base = tiny_student()
    folder = save_model(tmp_path / "base", base)
    model = add_adapter(base, LoraConfig(rank=8), seed=0)
    flags = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
    server = vllm_server(folder, flags=flags, environment={**DEV, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"})
    engine = engine_of(model, tmp_path, server, sleeps=True)
    for version in range(2):
        nudge_adapter(model)
        engine.sync(version)
        check_texts(engine, model, version)
        engine.rest()
        assert asleep(server.url)
    check_texts(engine, model, 1)


seen: list[bool] = []
address = ""


def grade_asleep(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    if address:
        seen.append(asleep(address))
    return [0.0] * len(completions)


def test_a_run_whose_server_sleeps_is_the_run_whose_server_does_not(
    untied_server: Server, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, sleeps in (("awake", False), ("asleep", True)):
        rollout, output = {"servers_sleep": sleeps}, str(tmp_path / name)
        run = run_on(tmp_path, untied_server, teacher_folder, rollout=rollout, output=output, grader=GRADER)
        monkeypatch.setattr(__name__ + ".address", untied_server.url if sleeps else "")
        found.append(read_records(train(run) / "records.jsonl").steps)
    assert seen[-3:] == [True] * 3 and not asleep(untied_server.url)
    for step, (awake, slept) in enumerate(zip(*found, strict=True)):
        assert slept.tokens == awake.tokens and slept.loss == pytest.approx(awake.loss, abs=1e-5)
        assert slept.probes["mismatch/behavior_max"] < 1e-3
        assert versions_of(tmp_path / "asleep", step) == {(step, step)}
