"""Real vLLM servers for the tests with marker `server`; each start takes half a minute, so tests share them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.real_vllm.vllm import VENV, Server, serve
from tests.small_runs import save_model
from tests.tiny import byte_tokenizer, tiny_model
from tropd.checkpoints.export import export_untied

WIDTH = 128  # vLLM's attention on CPUs wants heads of at least 32
DEV = {"VLLM_SERVER_DEV_MODE": "1"}
"""Opens the routes that take weights."""


def tiny_student() -> Any:
    return tiny_model(seed=3, sharp=4.0, tied=True, width=WIDTH)


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Server]]:
    """vllm_server(model_dir, flags=(...), ...) starts one as `serve` does; it ends with the session."""
    if not any(VENV.glob(".installed-*")):
        pytest.skip("vLLM is not installed: run `make vllm` (Linux on x86-64)")
    logs = tmp_path_factory.mktemp("vllm")
    with ExitStack() as stack:

        def start(model: Path, **options: object) -> Server:
            log = logs / f"{len(list(logs.iterdir()))}.log"
            return stack.enter_context(serve(model, log=log, **options))  # type: ignore[arg-type]

        yield start


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied tiny model that vLLM can serve on a CPU."""
    return save_model(
        tmp_path_factory.mktemp("served") / "teacher", tiny_model(seed=1, sharp=4.0, tied=True, width=WIDTH)
    )


@pytest.fixture(scope="session")
def teacher_server(vllm_server: Callable[..., Server], teacher_folder: Path) -> Server:
    return vllm_server(teacher_folder, flags=("--max-logprobs", "64"))


@pytest.fixture(scope="session")
def untied_server(vllm_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Ready to be given the tiny student's weights."""
    folder = export_untied(tiny_student(), byte_tokenizer(), tmp_path_factory.mktemp("student") / "untied")
    return vllm_server(folder, environment=DEV)
