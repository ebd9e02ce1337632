"""A teacher with another tokenizer than the student's, on real vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.bridge.kinds import tokenizer_of
from tests.one_step import write
from tests.real_vllm.test_teacher import TOLERANCE
from tests.real_vllm.vllm import Server
from tests.small_runs import run_of, save_model, write_rows
from tests.tiny import tiny_model
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.teachers.teacher import ScoreRequest
from tropd.training.assembly import load_parts

pytestmark = pytest.mark.server
OPD = {"name": "opd"}
CLIPPED = {"name": "tropd", "outlier": "clip", "beta": 1.0, "prefix": {"start": 0.5}}


def test_a_foreign_teacher_on_a_server_is_the_one_in_this_process(
    tmp_path: Path, teacher_server: Server, teacher_folder: Path
) -> None:
    """Token for token, and both students learn the same.  It writes prefixes too, which vLLM draws by itself."""
    tokenizer = tokenizer_of("smaller byte-level")
    student = save_model(tmp_path / "student", tiny_model(vocab=len(tokenizer), seed=3), tokenizer)
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(9)]
    data = {"path": str(write_rows(tmp_path / "data.jsonl", rows))}
    runs = {
        name: run_of(
            tmp_path,
            method,
            output=str(tmp_path / name),
            steps=2,
            student={"path": str(student)},
            teacher={"path": str(teacher_folder), "servers": servers, "bridge": {}},
            data=data,
        )
        for name, method, servers in (
            ("far", OPD, [teacher_server.url]),
            ("near", OPD, []),
            ("begun", CLIPPED, [teacher_server.url]),
        )
    }
    parts = {name: load_parts(runs[name], tmp_path) for name in ("far", "near")}
    rollouts = write(parts["near"])
    told = [x for x in parts["near"].briefer.as_read("teacher", rollouts) if x is not None]
    far, near = (parts[name].teacher.score(ScoreRequest(told)) for name in ("far", "near"))
    assert sum(int(x.read_T.sum()) for x in far if x.read_T is not None) > 20
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a.logprobs_T, b.logprobs_T, rtol=0, atol=TOLERANCE)
    parts["far"].teacher.close()
    steps = {name: read_records(train(run) / "records.jsonl").steps for name, run in runs.items()}
    for a, b in zip(steps["far"], steps["near"], strict=True):
        assert a.loss == pytest.approx(b.loss, abs=TOLERANCE) and a.loss != 0 and a.tokens == b.tokens
    assert all(step.tokens["teacher"] > 0 and step.gradient_norm > 0 for step in steps["begun"])
