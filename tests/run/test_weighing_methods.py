"""Methods that filter responses, gate by the grader or reshape the reward: each trains from its name in a run file,
goes on exactly from a checkpoint, and asks for a grader where it reads one."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import run_case
from tests.small_runs import values_of
from tests.told import WORDS, write_world
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.errors import EvidenceError
from tropd.methods import METHODS
from tropd.monitoring.records import read_records
from tropd.objective.evidence import Needs
from tropd.run.start import resume, train
from tropd.training.assembly import load_parts

NAMES = ("scope", "fire", "sg_opd", "opdvr", "rg_opd", "gndpo", "power_opd", "vopd", "exopd", "kdrl")
START = {"readers": {"start": {"path": "start"}}}
ON_TROPD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "fire": ({"drop": 0.4}, {}),
    "gndpo": ({}, {}),
    "opdvr": ({}, {}),
    "rg_opd": ({}, {}),
    "vopd": ({}, {}),
    "sg_opd": ({"agree": 1.5}, START),
    "exopd": ({}, START),
}
"""Extras on TrOPD, by name: knobs, and what the run file says beside the method."""
KNOBS: dict[str, dict[str, Any]] = {"sg_opd": {"phase": {"passes": 0.0}}}
"""So that each term has tokens in two steps: every text of the teacher passes."""
GRADED = [name for name in NAMES if Needs.REWARD in METHODS[name]().needs]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def write_file(world: Path, directory: Path, method: str | dict[str, Any], **changes: Any) -> Path:
    """A run file as a user writes it: the method is its name."""
    import tomli_w

    values = values_of(world, "quick", output=str(directory), grader=WORDS, **changes)
    values["method"] = {"name": method} if isinstance(method, str) else method
    path = directory.with_name(directory.name + ".toml")
    path.write_text(tomli_w.dumps(values))
    return path


def check_life(directory: Path) -> None:
    """Two steps that teach, and a second that is the same again from the checkpoint of the first."""
    records = read_records(directory / "records.jsonl").steps
    assert len(records) == 2
    assert all(math.isfinite(record.loss) and record.gradient_norm > 0 for record in records)
    assert not any(text.startswith(("mismatch", "no_signal")) for record in records for text in record.alarms)
    whole = run_case.trace(directory)
    for later in (directory / "checkpoints" / "step_000002", directory / "model"):
        shutil.rmtree(later)
    assert run_case.trace(resume(directory)) == whole and len(whole["records"]) == 1 + 2


@pytest.mark.parametrize("name", NAMES)
def test_a_run_file_that_names_a_method_trains_and_resumes_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    method = {"name": name, **KNOBS.get(name, {})}
    directory = train(Run.load(write_file(world, tmp_path / "run", method, rollout={"num_rollouts": 3})))
    assert all(part.tokens > 0 for part in read_records(directory / "records.jsonl").steps[0].terms.values())
    check_life(directory)


@pytest.mark.parametrize("name", ON_TROPD)
def test_the_same_on_tropd_trains_and_resumes_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    knobs, beside = ON_TROPD[name]
    method = {"name": "tropd", "top_k": 8, "beta": 0.1, "plus": [{"name": name, **knobs}]}
    check_life(train(Run.load(write_file(world, tmp_path / "run", method, **beside))))


def test_an_extra_whose_reference_nobody_is_says_which_section_is_missing(world: Path, tmp_path: Path) -> None:
    path = write_file(world, tmp_path / "run", {"name": "opd", "plus": ["exopd"]})
    with pytest.raises(EvidenceError, match=r"reads what reader 'start' says.*Add a section \[readers.start\]"):
        load_parts(Run.load(path), tmp_path)


def test_the_methods_that_read_a_grader_are_known() -> None:
    assert GRADED == ["scope", "sg_opd", "opdvr", "rg_opd", "kdrl"]


@pytest.mark.parametrize("name", GRADED)
def test_a_method_that_reads_a_reward_without_a_grader_is_one_clear_error(
    world: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_file(world, tmp_path / "run", name)
    path.write_text(path.read_text().replace("grader = ", "seed = 0 # "))
    run = Run.load(path)
    with pytest.raises(
        EvidenceError, match=f"method '{name}' reads a grader's reward, and the run has no grader. Set one"
    ):
        load_parts(run, tmp_path)
    assert any(check.level == "error" and "has no grader" in check.found for check in examine(run, num_prompts=0))
    assert main(["train", str(path)]) == 2
    assert "has no grader" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "records.jsonl").exists()
