"""Responses that a reader did not read, in the records and the saved rollouts of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.small_runs import run_of
from tests.told import PEERS, WORDS, write_world
from tropd.run.start import train


@pytest.mark.parametrize("name", ["teacher", "elder", "pair"])
def test_unread_responses_are_counted_and_their_zeros_are_in_no_probe_and_no_file(tmp_path: Path, name: str) -> None:
    world = write_world(tmp_path)
    (world / "elder.py").write_text(
        "from tropd import OPD, Objective, Term\n"
        "from tropd.objective.losses import SampledReverseKL\n"
        "from tropd.objective.selectors import STUDENT\n"
        "from dataclasses import dataclass\n\n\n@dataclass(frozen=True, kw_only=True)\nclass Elder(OPD):\n"
        '    """Another reader."""\n\n    @property\n    def objective(self):\n'
        f'        return Objective(Term("elder", STUDENT, SampledReverseKL(reader="{name}")), '
        "*super().objective.terms)\n"
    )
    copy = {"path": str(world / "copy"), "briefing": {**PEERS, "failures": 0}}
    changes: dict[str, Any] = {"teacher": copy, "method": {"name": "opd"}}
    if name != "teacher":
        made = {"pair": {"mean": ["teacher", "elder"]}} if name == "pair" else {}
        changes = {"readers": {"elder": copy, **made}, "teacher": {"path": str(world / "teacher")}}
        changes["method"] = {"name": f"{world / 'elder.py'}:Elder"}
    method = changes.pop("method")
    run = run_of(
        world,
        method,
        kind="quick",
        data={"path": str(world / "told.jsonl")},
        grader=WORDS,
        rollout={"num_prompts": 3, "num_rollouts": 2, "save_every": 1},
        output=str(tmp_path / "run"),
        **changes,
    ).imported()
    train(run)
    lines = (tmp_path / "run" / "records.jsonl").read_text().splitlines()
    records = [record for line in lines if "step" in (record := json.loads(line))]
    shares = []
    for record in records:
        rows = pq.read_table(tmp_path / "run" / "rollouts" / f"step_{record['step']:06d}.parquet").to_pylist()
        shares.append(record["probes"].get(f"unread/{name}", 0.0))
        if name != "teacher":
            assert set(record["probes"]) >= {"unread/elder", f"unread/{name}"}
            assert "unread/teacher" not in record["probes"]
            assert record["probes"]["unread/elder"] == shares[-1], "what is made of others reads what all of them read"
            assert all(None not in row["teacher_logprobs"][-1:] for row in rows)
            continue
        unread = [row for row in rows if row["teacher_logprobs"][-1] is None]
        assert shares[-1] == pytest.approx(len(unread) / len(rows))
        said = [x for row in rows for x in row["teacher_logprobs"] if x is not None]
        assert record["probes"]["teacher/mean_logprob"] == pytest.approx(sum(said) / len(said), rel=1e-5)
        assert 0.0 not in said
        assert all(w in (0.0, None) for row in unread for term in ("pull",) for w in row.get(f"weight_{term}", ()))
    assert 0 < max(shares) < 1, "some are read and some are not"
