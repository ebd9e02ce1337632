"""How much a rollout server can hold limits the prompts, as models in this process do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.servers.mini import MiniServer
from tests.small_runs import run_of, write_models
from tropd.config.run import Run
from tropd.errors import DataError
from tropd.monitoring.records import read_records
from tropd.rollout.delivery import weights_folder
from tropd.run.start import assemble, train

OPD = {"name": "opd"}
HELD = 50
"""Tokens, 10 of them for the answer."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("world"))
    for name, lengths in (("mixed", range(5, 65, 5)), ("long", range(45, 65))):
        rows = [{"prompt": "1+1".ljust(length, "="), "answer": "2"} for length in lengths]
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


def run_on(world: Path, output: Path, server: MiniServer, **changes: Any) -> Run:
    rollout = {"servers": [server.url], **changes.pop("rollout", {})}
    return run_of(world, OPD, output=str(output), rollout=rollout, **changes)


def test_prompts_without_room_at_a_server_are_left_out_and_told_of(world: Path, tmp_path: Path) -> None:
    data = {"path": str(world / "mixed.jsonl")}
    evaluation = {"data": data, "num_samples": 1, "max_new_tokens": 20}
    with MiniServer(world / "student", max_model_len=HELD) as server:
        asked = run_on(world, tmp_path / "run", server, data=data, evaluation=evaluation, steps=4)
        parts = assemble(asked, tmp_path)
        parts.engine.close()
        train(asked)
    (trained_on, held_out) = [note for note in parts.notes if note.startswith(data["path"])]
    longest = max(len(prompt.token_ids) for prompt in parts.held_out)
    assert "too long" in trained_on and "too long" in held_out and longest <= HELD - 20
    assert len(read_records(tmp_path / "run" / "records.jsonl").steps) == 4


def test_a_run_without_a_prompt_that_fits_is_refused_at_the_start_and_its_engine_is_closed(
    world: Path, tmp_path: Path
) -> None:
    with MiniServer(world / "student", max_model_len=HELD) as server:
        given = {"weights_folder": str(tmp_path / "memory")}
        asked = run_on(world, tmp_path / "run", server, data={"path": str(world / "long.jsonl")}, rollout=given)
        left = weights_folder(asked.rollout.weights_folder, Path(asked.output))
        left.mkdir(parents=True)  # by a run that was killed; whoever is closed removes it
        with pytest.raises(
            DataError, match=r"no row of .*long.jsonl makes a prompt: 20 rows read, 0 prompts\n  20 too long"
        ):
            train(asked)
    assert not (tmp_path / "run" / "run.toml").exists() and not left.exists()
