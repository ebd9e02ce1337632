"""A self-teacher that is told the solution, on real vLLM: what it says, and what the student learns of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.one_step import write
from tests.real_vllm.test_teacher import TOLERANCE
from tests.real_vllm.vllm import Server
from tests.small_runs import run_of, write_rows
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.training.assembly import load_parts
from tropd.training.scoring import score

pytestmark = pytest.mark.server
SAID = {"kind": "column", "column": "solution", "template": "{prompt} ({value})"}
OPSD = {"name": "opsd", "teacher_top_k": 16, "top_k": 0, "top_p": 1.0}


def told(world: Path, teacher: Path, servers: list[str], **changes: Any) -> dict[str, Any]:
    rows = [{"prompt": f"{n}+{n}=", "answer": str(2 * n), "solution": f"{n} after {n}"} for n in range(9)]
    return {
        "steps": 2,
        "student": {"path": str(teacher)},
        "teacher": {"path": str(teacher), "briefing": SAID, "servers": servers},
        "data": {"path": str(write_rows(world / "told.jsonl", rows))},
        "optimizer": {"learning_rate": 1e-3},
        **changes,
    }


def test_a_told_teacher_on_a_server_is_the_one_in_this_process(
    tmp_path: Path, teacher_server: Server, teacher_folder: Path
) -> None:
    """Token for token, behind the solution; and both students are the same after two steps."""
    runs = {
        name: run_of(tmp_path, OPSD, output=str(tmp_path / name), **told(tmp_path, teacher_folder, servers))
        for name, servers in (("far", [teacher_server.url]), ("near", []))
    }
    said = {}
    for name, run in runs.items():
        parts = load_parts(run, tmp_path)
        rollouts, objective = write(parts), run.method.objective
        as_read = {"teacher": parts.briefer.as_read("teacher", rollouts)}
        assert None not in as_read["teacher"] and as_read["teacher"] != rollouts
        judged = score(rollouts, objective, parts.readers, parts.learner, seed=0, recall=False, as_read=as_read)
        said[name] = judged.tokens
        parts.teacher.close()
    for field in ("token_ids_N", "teacher_topk_ids_NK"):
        assert torch.equal(said["far"].peek(field), said["near"].peek(field)), field
    for field in ("teacher_logprobs_N", "teacher_topk_logprobs_NK"):
        torch.testing.assert_close(said["far"].peek(field), said["near"].peek(field), rtol=0, atol=TOLERANCE)
    assert float(said["far"].log_ratio_N.abs().mean()) > 0.01, "the solution says something"
    far, near = (read_records(train(run) / "records.jsonl").steps for run in runs.values())
    for a, b in zip(far, near, strict=True):
        assert a.loss == pytest.approx(b.loss, abs=TOLERANCE) and a.loss != 0
        assert a.gradient_norm == pytest.approx(b.gradient_norm, rel=1e-3)


def test_two_readers_ask_one_server(tmp_path: Path, teacher_server: Server, teacher_folder: Path) -> None:
    """Each on its own prompt: the model of [teacher] is served once."""
    (tmp_path / "both.py").write_text(
        "from dataclasses import dataclass\n"
        "from tropd import Method, Objective, Term\n"
        "from tropd.objective.losses import ForwardKL, SampledReverseKL\n"
        "from tropd.objective.selectors import STUDENT\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Both(Method):\n"
        "    @property\n"
        "    def objective(self):\n"
        "        guide = ForwardKL(support='teacher_top_k', top_k=8, reader='plain')\n"
        "        return Objective(Term('pull', STUDENT, SampledReverseKL()), Term('guide', STUDENT, guide))\n"
    )
    losses = []
    for name, servers in (("far", [teacher_server.url]), ("near", [])):
        settings = told(tmp_path, teacher_folder, servers, readers={"plain": {}}, output=str(tmp_path / name))
        run = run_of(tmp_path, {"name": str(tmp_path / "both.py:Both")}, **settings).imported()
        losses.append([step.loss for step in read_records(train(run) / "records.jsonl").steps])
    assert losses[0] == pytest.approx(losses[1], abs=TOLERANCE) and losses[0][0] != 0
