"""One TOML file trains any family with any method, and what it leaves behind can be read by others."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.small_runs import NEW_TOKENS, TROPD, run_of, write_models, write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.cli.main import main
from tropd.methods import METHODS
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.types import READER, StepRecord

TEACHABLE = [name for name, cls in METHODS.items() if set(cls().readers) <= {READER} and name != "sft"]
"""Those that any teacher can teach alone; tests/run/test_self_taught.py trains the others."""


def records_of(directory: Path) -> list[StepRecord]:
    return read_records(directory / "records.jsonl").steps


def exported(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory / "model").eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_one_toml_trains_any_family_end_to_end(tmp_path: Path, family: str, tied: bool) -> None:
    run = run_of(write_models(tmp_path, family, tied=tied))
    directory = train(run)
    records = records_of(directory)
    assert [record.step for record in records] == [0, 1, 2]
    for record in records:
        assert math.isfinite(record.loss) and record.gradient_norm > 0
        assert set(record.terms) == {"trusted", "outlier", "guidance"}
        assert record.tokens["teacher"] > 0 and record.tokens["student"] > 0
        assert not any(text.startswith(("mismatch", "no_signal")) for text in record.alarms)
        assert record.probes["length/max"] <= NEW_TOKENS
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "student").state_dict()
    after = exported(directory).state_dict()
    assert before.keys() == after.keys()
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert unchanged == []


def test_what_a_run_leaves_can_be_read_by_others(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    directory = train(run_of(write_models(tmp_path)))
    tables = [pq.read_table(path).to_pylist() for path in sorted((directory / "rollouts").iterdir())]
    assert [len(rows) for rows in tables] == [6, 6, 6]
    for row in tables[0]:
        assert len(row["token_ids"]) == len(row["authors"]) == len(row["teacher_logprobs"])
        teachers = [author == "teacher" for author in row["authors"]]
        assert [(weight or 0) > 0 for weight in row["weight_guidance"]] == teachers
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == [
        f"step_00000{n}" for n in (1, 2, 3)
    ]
    model = exported(directory)
    saved = checkpoints.load(directory / "checkpoints" / "step_000003").weights
    own = dict(model.named_parameters())
    assert saved.keys() == own.keys() and all(torch.equal(saved[name], own[name]) for name in own)
    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], add_generation_prompt=True)
    written = model.generate(torch.tensor([ids["input_ids"]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert written.shape[1] > len(ids["input_ids"])
    assert "tropd" in (directory / "model" / "README.md").read_text()


@pytest.mark.parametrize("name", TEACHABLE)
def test_every_method_trains_on_a_pair_of_models(tmp_path: Path, name: str) -> None:
    directory = train(run_of(write_models(tmp_path), {"name": name}, steps=2))
    records = records_of(directory)
    assert len(records) == 2
    assert all(math.isfinite(record.loss) and math.isfinite(record.gradient_norm) for record in records)
    assert all(record.gradient_norm > 0 for record in records)
    assert all(sum(part.tokens for part in record.terms.values()) > 0 for record in records)
    assert not any(text.startswith(("mismatch", "no_signal")) for record in records for text in record.alarms)


def test_an_adapter_is_trained_and_its_base_left_alone(tmp_path: Path) -> None:
    run = run_of(write_models(tmp_path), student={"lora": {"rank": 4, "alpha": 8}}, optimizer={"learning_rate": 1e-2})
    directory = train(run)
    assert records_of(directory)[-1].gradient_norm > 0
    adapter = load_file(directory / "model" / "adapter_model.safetensors")
    assert adapter and all("lora_" in name for name in adapter)
    assert all(bool(x.abs().max() > 0) for x in adapter.values())


def test_a_base_is_the_teacher_of_its_own_adapter_and_says_nothing_at_first(tmp_path: Path) -> None:
    run = run_of(
        write_models(tmp_path),
        TROPD | {"guidance": False},
        teacher={"path": "base"},
        student={"lora": {"rank": 4, "alpha": 8}},
    )
    records = records_of(train(run))
    assert [record.gradient_norm for record in records] == [0.0, 0.0, 0.0]
    assert records[0].probes["ratio/min"] == records[0].probes["ratio/max"] == 0.0


def test_several_updates_on_one_batch_leave_the_sampling_student_behind(tmp_path: Path) -> None:
    directory = train(run_of(write_models(tmp_path), optimizer={"learning_rate": 1e-3, "num_updates": 3}, steps=1))
    (record,) = records_of(directory)
    assert math.isfinite(record.loss) and record.gradient_norm > 0
    assert checkpoints.load(directory / "checkpoints" / "step_000001").state["optimizer_steps"] == 3


def test_a_students_own_dropout_is_switched_off_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = train(run_of(write_models(tmp_path, "gpt2"), steps=1))
    assert "own dropout (0.1) is switched off" in capsys.readouterr().out
    assert records_of(directory)[0].probes["mismatch/behavior_max"] < 1e-4
    assert exported(directory).config.resid_pdrop == 0.1


def test_the_command_line_trains_what_the_file_says_and_flags_change_it(tmp_path: Path) -> None:
    path = str(write_run(write_models(tmp_path), tmp_path / "run", "short"))
    assert main(["train", path, "--steps", "1", "--method.top-k", "4"]) == 0
    (record,) = records_of(tmp_path / "run")
    assert record.gradient_norm > 0
    assert "top_k = 4" in (tmp_path / "run" / "run.toml").read_text()
    assert main(["train", path]) == 2  # nothing is written over a run
