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
CLIPPED = {"name": "tropd", "outlier": "clip", "beta": 1.0, "prefix": {"start": 0.5}}


def test_a_foreign_teacher_on_a_server_is_the_one_in_this_process(
    tmp_path: Path, teacher_server: Server, teacher_folder: Path
) -> None:
    """It writes the prefixes and scores; both students are the same after two steps."""
    tokenizer = tokenizer_of("smaller byte-level")
    student = save_model(tmp_path / "student", tiny_model(vocab=len(tokenizer), seed=3), tokenizer)
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n)} for n in range(9)]
    data = {"path": str(write_rows(tmp_path / "data.jsonl", rows))}
    runs = {
        name: run_of(
            tmp_path,
            CLIPPED,
            output=str(tmp_path / name),
            steps=2,
            student={"path": str(student)},
            teacher={"path": str(teacher_folder), "servers": servers, "bridge": {}},
            data=data,
        )
        for name, servers in (("far", [teacher_server.url]), ("near", []))
    }
    parts = {name: load_parts(run, tmp_path / f"{name} texts") for name, run in runs.items()}
    rollouts = write(parts["near"])
    told = [x for x in parts["near"].briefer.as_read("teacher", rollouts) if x is not None]
    far, near = (parts[name].teacher.score(ScoreRequest(told)) for name in ("far", "near"))
    assert sum(int(x.read_T.sum()) for x in far if x.read_T is not None) > 20
    for a, b in zip(far, near, strict=True):
        torch.testing.assert_close(a.logprobs_T, b.logprobs_T, rtol=0, atol=TOLERANCE)
    parts["far"].teacher.close()
    steps = [read_records(train(run) / "records.jsonl").steps for run in runs.values()]
    for a, b in zip(*steps, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=0.02) and a.loss != 0
