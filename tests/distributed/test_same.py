"""Two and four processes train the student that one trains.

Sampled tokens and trust draws are equal exactly.  Weights are equal up to the rounding of float32 in another order of
addition: a relative error of 1e-5 of each tensor's norm after three steps.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.base.test_names import PACKAGE
from tests.distributed import launch
from tests.distributed.conftest import Alone
from tests.distributed.launch import distance, rollouts_of, weights_of
from tests.servers.sleeper import Sleeper
from tests.small_runs import merged, write_run
from tropd.monitoring.records import read_records

TOLERANCE = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "tropd": {},
    "entropy_opd": {"method": {"name": "entropy_opd"}},
    "tip": {"method": {"name": "tip"}, "tile_tokens": 3},
    "teachable": {"method": {"name": "ta_opd", "fraction": 0.2}},
    "near future": {"method": {"name": "near_future", "separation": 3, "window": 4}},
    "lookahead": {"method": {"name": "lgr", "top_k": 4}},
    "two updates": {"optimizer": {"num_updates": 2}},
    "groups": {"method": {"name": "topd"}},
    "batch coin": {"method": {"name": "gkd"}},
    "filter and whitening": {"method": {"name": "fire", "scope": "batch", "drop": 0.3, "plus": ["gndpo"]}},
    "adaptive horizon": {"method": {"name": "adwin", "horizon": {"tokens": 3, "every": 2, "low": 1.0, "high": 1.0}}},
    "replay": {
        "method": {"name": "opd"},
        "rollout": {"num_prompts": 4, "num_rollouts": 2, "policy": {"name": "replay", "share": 0.5}},
    },
    "phased": {
        "method": {"name": "opd"},
        "rollout": {"policy": {"name": "phased", "share": {"shape": "constant", "start": 0.5}, "passes": 0.0}},
    },
    "untied": {
        "student": {"path": "untied"},
        "method": {"name": "opd"},
        "probes": ["change", "geometry", f"{PACKAGE}/gentle/probe.py:Sure"],
    },
    "hidden states": {"method": {"name": "tests.matched:Matched"}},
    "hidden states alone": {"method": {"name": "tests.matched:Matched", "reward": False, "layers": "last"}},
    "student and teacher interleaved": {"method": {"name": "skd"}},
    "student and teacher blended": {
        "method": {"name": "trb", "epsilon": {"shape": "switch", "start": 0.1, "end": 0.0, "until": 0.5}}
    },
    "responses that end early": {
        "method": {
            "name": "kat",
            "mode": "online",
            "trap": {"window": 2, "streak": 2, "eta": 0.7, "exempt": 3, "entries": 4, "steps": 1},
        }
    },
    "several teachers": {
        "teacher": {"path": "base"},
        "teachers": {"even": {"path": "teacher"}, "odd": {"path": "untied"}},
        "data": {"teacher_column": "kind"},
    },
}


def here(models: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Names of models as paths."""
    found: dict[str, Any] = {}
    for name, teacher in changes.get("teachers", {}).items():
        found.setdefault("teachers", {})[name] = {"path": str(models / teacher["path"])}
    if path := changes.get("student", {}).get("path"):
        found["student"] = {"path": str(models / path)}
    return merged(changes, found)


def assert_same_run(one: Path, other: Path, tolerance: float = TOLERANCE) -> None:
    mine, theirs = rollouts_of(one), rollouts_of(other)
    assert mine.keys() == theirs.keys() and mine
    for name, row in mine.items():
        assert row["token_ids"] == theirs[name]["token_ids"]
        assert row["authors"] == theirs[name]["authors"]
        for column in [c for c in row if c.startswith("weight_")]:
            a, b = ([w or 0.0 for w in rows] for rows in (row[column], theirs[name][column]))
            assert [w > 0 for w in a] == [w > 0 for w in b], column
            assert a == pytest.approx(b, rel=1e-4)
    assert distance(one, other) < tolerance
    for a, b in zip(*(read_records(d / "records.jsonl").steps for d in (one, other)), strict=True):
        assert (a.tokens, a.learning_rate, a.evaluation) == (b.tokens, b.learning_rate, b.evaluation)
        assert (a.loss, a.gradient_norm) == pytest.approx((b.loss, b.gradient_norm), rel=1e-4)
        # A sharded student asks for the top-k of all tokens, one alone for a sample: this probe is about those at hand.
        about = "mass/student_in_teacher_top_k"
        found, others = ({n: x for n, x in r.probes.items() if not n.endswith(about)} for r in (a, b))
        assert found == pytest.approx(others, rel=1e-3, abs=1e-4)
        for term, stats in a.terms.items():
            assert dataclasses.asdict(b.terms[term]) == pytest.approx(dataclasses.asdict(stats), rel=1e-4, abs=1e-6)


def compare(models: Path, alone: Alone, directory: Path, size: int, parallel: dict[str, Any], **changes: Any) -> Path:
    changes = here(models, changes)
    path = write_run(models, directory, "ranks", parallel=parallel, **changes)
    launch.run(size, train=path, directory=directory)
    assert_same_run(alone(**changes), directory)
    return directory


LORA = {"student": {"lora": {"rank": 4, "alpha": 8}}, "teacher": {"path": "base"}, "method": {"name": "opd"}}
RARE = pytest.mark.slow


@pytest.mark.parametrize(
    "case", [c if c in ("tropd", "entropy_opd", "tip") else pytest.param(c, marks=RARE) for c in CASES]
)
def test_two_processes_train_the_student_of_one(case: str, models: Path, alone: Alone, tmp_path: Path) -> None:
    directory = compare(models, alone, tmp_path / "run", 2, {}, **CASES[case])
    assert any((directory / "checkpoints" / "step_000003").glob("shard-00002*"))


@pytest.mark.parametrize("case", ["tropd", pytest.param("entropy_opd", marks=RARE), pytest.param("tip", marks=RARE)])
def test_four_processes_train_the_student_of_one(case: str, models: Path, alone: Alone, tmp_path: Path) -> None:
    compare(models, alone, tmp_path / "run", 4, {}, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["tropd", "tip", "lookahead", "student and teacher blended"])
def test_a_sharded_teacher_teaches_the_same(case: str, models: Path, alone: Alone, tmp_path: Path) -> None:
    """It writes prefixes for tropd, gives tip whole distributions, reads branches for a lookahead, and writes with the
    student."""
    compare(models, alone, tmp_path / "run", 2, {"teacher": "sharded"}, **CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [CASES["tropd"], CASES["adaptive horizon"], LORA], ids=["full", "adaptive horizon", "lora"]
)
def test_a_replicated_student_learns_the_same(
    changes: dict[str, Any], models: Path, alone: Alone, tmp_path: Path
) -> None:
    kind = {} if changes is LORA else {"student": "replicated"}
    directory = compare(models, alone, tmp_path / "run", 2, kind, **changes)
    assert (directory / "checkpoints" / "step_000003" / "weights.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("sleeps", [False, True], ids=["awake", "asleep"])
def test_processes_share_the_servers_that_write(sleeps: bool, models: Path, alone: Alone, tmp_path: Path) -> None:
    """Rank 0 gives the weights, which every rank then finds there; the server's draws are the engine's own."""
    with Sleeper(models / "student") as server:
        rollout = {"servers": [server.url], "weights_folder": str(tmp_path / "memory"), "servers_sleep": sleeps}
        path = write_run(models, tmp_path / "run", "ranks", rollout=rollout, method={"name": "opd"})
        launch.run(2, train=path, directory=tmp_path / "run")
        reloads = [body for body in server.requests if body.get("method") == "reload_weights"]
    assert len(reloads) == 4, "at the start and after each of three steps, by one process"
    assert server.paths.count("/sleep?level=2") == 4 * sleeps, "once to try it, and after each step's rollouts"
    assert list((tmp_path / "memory").iterdir()) == [], "what was put there is removed at the end"
    mine, theirs = rollouts_of(alone(method={"name": "opd"})), rollouts_of(tmp_path / "run")
    assert {name: row["token_ids"] for name, row in mine.items()} == {n: r["token_ids"] for n, r in theirs.items()}
    assert distance(alone(method={"name": "opd"}), tmp_path / "run") < 1e-4, "the server scores with other batches"


@pytest.mark.slow
def test_activation_checkpointing_changes_nothing(models: Path, alone: Alone, tmp_path: Path) -> None:
    path = write_run(models, tmp_path / "run", "ranks", student={"gradient_checkpointing": True})
    launch.run(2, train=path, directory=tmp_path / "run")
    assert_same_run(alone(), tmp_path / "run")


def test_the_weights_move_so_that_equality_means_something(models: Path, alone: Alone) -> None:
    before, after = load_file(models / "student" / "model.safetensors"), weights_of(alone())
    assert max(float((before[name] - x).norm() / x.norm()) for name, x in after.items()) > 100 * TOLERANCE
