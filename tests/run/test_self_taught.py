"""Methods that prescribe their own readers: a run file that names the method is enough, and a killed run goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests import run_case
from tests.kills import kill_at, recorded
from tests.small_runs import values_of
from tests.told import WORDS, write_world
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.doctor import examine
from tropd.errors import ConfigError
from tropd.methods import METHODS
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.training.assembly import load_parts

TAUGHT = [name for name, cls in METHODS.items() if (cls().readers or name == "oprd") and name != "omniopd"]
"""A chat endpoint teaches the one that is left out: tests/servers/test_omniopd.py."""
GATE = {"min_steps": 2, "rise": 0.0, "tail": 9.0, "clipped": 1.0}
ITSELF = {"teacher": {"path": "student"}}
CASES: dict[str, dict[str, Any]] = {
    "cgtr": {"method": {"gate": GATE}},
    **{name: {"teacher": {"path": "teacher"}} for name in ("oprd", "exopd", "sg_opd")},
    "ogls": {"rollout": {"num_rollouts": 6}},
    "safesteer": {"method": {"direction": "direction.safetensors", "layer": 1, "ids": [40, 50, 60]}},
    "sft": {"data": {"response_column": "solution"}},
    "unisd": {"method": {"gamma": 1.0, "sync": 1}},
}
"""What a method needs beside its name."""
SHOWN = ["unisd", "multi_rollout", "cgtr", "ogls"]
"""Killed in every session of the tests; the others are slow."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = write_world(tmp_path_factory.mktemp("world"), max_position_embeddings=2048)
    save_file(
        {"direction": torch.randn(32, generator=torch.Generator().manual_seed(0))}, world / "direction.safetensors"
    )
    return world


def write_file(world: Path, directory: Path, name: str, **changes: Any) -> Path:
    """A run file as a user writes it: no teacher, unless the method needs one of its own."""
    import tomli_w

    case = CASES.get(name, {})
    method = {"name": name, **case.get("method", {}), **changes.pop("method", {})}
    values = values_of(world, "quick", method=method, output=str(directory), grader=WORDS)
    values |= {"tokens_per_micro_batch": 8192, **changes}
    values["data"] = {"path": str(world / "told.jsonl"), **case.get("data", {})}
    values["rollout"] |= {"num_rollouts": 3, **case.get("rollout", {})}
    if "direction" in method:
        method["direction"] = str(world / method["direction"])
    teacher = {**case.get("teacher", {}), **changes.get("teacher", {})}
    if teacher.get("path") == "teacher":
        teacher["path"] = str(world / "teacher")
    values.pop("teacher")
    values |= {"teacher": teacher} if teacher else {}
    path = directory.with_name(directory.name + ".toml")
    path.write_text(tomli_w.dumps(values))
    return path


@pytest.mark.parametrize("name", TAUGHT)
def test_the_name_of_a_self_teaching_method_is_all_that_a_run_file_says_of_its_readers(
    world: Path, tmp_path: Path, name: str
) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", name)))
    records = read_records(directory / "records.jsonl").steps
    assert len(records) == 2
    assert all(math.isfinite(record.loss) and record.gradient_norm > 0 for record in records)
    assert all(sum(part.tokens for part in record.terms.values()) > 0 for record in records)
    assert not any(text.startswith(("mismatch", "no_signal")) for record in records for text in record.alarms)


@pytest.mark.parametrize(
    "name", [name if name in SHOWN else pytest.param(name, marks=pytest.mark.slow) for name in TAUGHT]
)
def test_a_self_taught_run_that_is_killed_goes_on_bit_for_bit(world: Path, tmp_path: Path, name: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    steps: dict[str, Any] = {"steps": 5, "checkpoint": {"every": 1, "keep": 9}}
    ended = run_case.train(write_file(world, whole, name, **steps), whole)
    assert ended.code == 0, ended.said
    kill_at(write_file(world, killed, name, **steps), killed, [(recorded(1), 0.0), (recorded(3), 0.0)])
    assert run_case.trace(killed) == run_case.trace(whole)
    losses = [json.loads(line).get("loss") for line in (whole / "records.jsonl").read_text().splitlines()]
    assert any(losses)


def test_a_live_self_teacher_that_is_told_nothing_gives_no_reward_to_the_last_bit(world: Path, tmp_path: Path) -> None:
    run = Run.load(write_file(world, tmp_path / "run", "opd", **ITSELF))
    before = {key: x.clone() for key, x in load_parts(run, tmp_path).model.state_dict().items()}
    directory = train(run)
    assert [record.gradient_norm for record in read_records(directory / "records.jsonl").steps] == [0.0, 0.0]
    after = AutoModelForCausalLM.from_pretrained(directory / "model").state_dict()
    assert all(torch.equal(x, after[key]) for key, x in before.items() if key in after)


@pytest.mark.parametrize("name", ["opsd", "sdft", "sdpo", "multi_rollout", "cgtr"])
def test_a_live_self_teacher_that_is_told_nothing_has_no_divergence_beyond_rounding(
    world: Path, tmp_path: Path, name: str
) -> None:
    """A softmax in float32 sums to 1 but for its last bits, and that is what is left of a gradient."""
    silent, told = tmp_path / "silent", tmp_path / "told"
    here = read_records(train(Run.load(write_file(world, silent, name, **ITSELF))) / "records.jsonl").steps[0]
    there = read_records(train(Run.load(write_file(world, told, name))) / "records.jsonl").steps[0]
    assert abs(here.loss) < 1e-8 and here.gradient_norm < 1e-6 and there.gradient_norm > 1e-2


def test_a_section_of_the_run_stands_in_for_what_a_method_prescribes(world: Path, tmp_path: Path) -> None:
    prescribed = Run.load(write_file(world, tmp_path / "one", "opsd"))
    said = {"path": "start", "briefing": {"kind": "column", "column": "hint"}}
    own = Run.load(write_file(world, tmp_path / "two", "opsd", teacher=said))
    assert prescribed.all_teachers["default"].briefing.columns == ("solution",)
    assert own.all_teachers["default"].briefing.columns == ("hint",)
    silent = load_parts(Run.load(write_file(world, tmp_path / "three", "opsd", **ITSELF)), tmp_path)
    assert any("its teacher is told nothing" in note for note in silent.notes)
    assert not any("is told nothing" in note for note in load_parts(prescribed, tmp_path).notes)


def test_a_reader_of_the_run_stands_in_for_one_of_the_method(world: Path, tmp_path: Path) -> None:
    own = {"context_1": {"briefing": {"kind": "column", "column": "hint"}}}
    run = Run.load(write_file(world, tmp_path / "run", "unisd", readers=own))
    assert run.all_readers["context_1"].briefing.columns == ("hint",)
    assert set(run.all_readers) == {"context_0", "context_1", "context_2", "bad"}
    parts = load_parts(run, tmp_path)
    assert all(reader is parts.teacher for reader in parts.readers.values()), "one model reads for all of them"


def test_a_section_of_a_reader_whose_name_is_a_slip_is_refused(world: Path, tmp_path: Path) -> None:
    run = Run.load(write_file(world, tmp_path / "run", "unisd", readers={"contxt_1": {}}))
    says = r"\[readers.contxt_1\], but method 'unisd' reads no such reader \(did you mean 'context_1'"
    with pytest.raises(ConfigError, match=says):
        load_parts(run, tmp_path)
    assert any(check.level == "error" and "contxt_1" in check.found for check in examine(run, num_prompts=0))
    other = Run.load(write_file(world, tmp_path / "run", "unisd", readers={"solver": {}}))
    assert any("'unisd' reads nothing of 'solver'" in note for note in load_parts(other, tmp_path).notes)


@pytest.mark.parametrize(
    ("name", "teacher", "readers"),
    [
        ("opsd", "start", None),
        ("ogls", "start", "right: teacher; wrong: teacher; steered: teacher, steered by 1 from wrong to right"),
        ("sft", "nobody", None),
    ],
)
def test_header_and_model_card_name_who_teaches_and_who_reads(
    world: Path, tmp_path: Path, name: str, teacher: str, readers: str | None
) -> None:
    directory = train(Run.load(write_file(world, tmp_path / "run", name, steps=1)))
    header = json.loads((directory / "records.jsonl").read_text().splitlines()[0])
    assert (header["teacher"], header.get("readers")) == (teacher, readers)
    card = (directory / "model" / "README.md").read_text()
    assert f"- teacher: `{teacher}`" in card and (f"- readers: `{readers}`" in card) is bool(readers)
    assert "base`" not in card


def test_fine_tuning_without_responses_is_refused(world: Path, tmp_path: Path) -> None:
    path = write_file(world, tmp_path / "run", "sft")
    with pytest.raises(ConfigError, match="prompts bring none. Set data.response_column"):
        train(Run.load(path, ["--data.response-column", "None"]))


@pytest.mark.parametrize("name", ["unisd", "ogls", "safesteer"])
def test_the_doctor_and_the_plan_of_a_run_know_the_readers_of_its_method(
    world: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_file(world, tmp_path / "run", name))
    assert main(["doctor", path, "--trust-code", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    told = " ".join(str(check) for check in checks if check["name"] == "briefing")
    readers = Run.load(path).all_readers
    assert all(f"reader '{reader}'" in told for reader, config in readers.items() if not config.made_of)
    assert main(["plan", path, "--trust-code"]) == 0


def test_a_gated_teacher_needs_a_grader(world: Path, tmp_path: Path) -> None:
    path = write_file(world, tmp_path / "run", "cgtr")
    path.write_text(path.read_text().replace("grader = ", "seed = 0 # "))
    with pytest.raises(ConfigError, match="rule 'gated', which waits until the reward rises, but there is no grader"):
        Run.load(path)
