"""The exported student is the trained one, for people who have never heard of tropd."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import tropd
from tests import run_case
from tests.small_runs import write_run
from tropd.checkpoints import checkpoint as checkpoints
from tropd.checkpoints.export import export, merge, model_card
from tropd.config.run import Run
from tropd.errors import CheckpointError, ConfigError
from tropd.model.loading import add_adapter, load_model, load_tokenizer

STRANGER = """
import json, sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
torch.set_num_threads(1)
out, *folders = sys.argv[1:]
prompts = {}
for folder in folders:
    folder, _, base = folder.partition("=")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(base or folder)
    if base:
        from peft import PeftModel
        model = PeftModel.from_pretrained(model, folder)
    else:
        assert GenerationConfig.from_pretrained(folder).eos_token_id == tokenizer.eos_token_id
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "1+1="}], add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([ids])
    with torch.no_grad():
        prompts[folder] = [ids, model.eval()(ids).logits, tokenizer.decode(ids[0])]
assert not any(name.split(".")[0] == "tropd" for name in sys.modules)
torch.save(prompts, out)
"""
"""What somebody with transformers and peft, and without tropd, would do: prompt, logits and text by folder."""


Asked = dict[str, tuple[torch.Tensor, torch.Tensor, str]]


@pytest.fixture(scope="module")
def runs(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    paths = {case: write_run(models, folder / case, case) for case in ("tropd", "bfloat16", "lora")}
    for case, path in paths.items():
        ended = run_case.train(path, folder / case)
        assert ended.code == 0, ended.said
    return {case: folder / case for case in paths}


@pytest.fixture(scope="module")
def merged(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return merge(runs["lora"] / "model", tmp_path_factory.mktemp("merged") / "model", device=torch.device("cpu"))


@pytest.fixture(scope="module")
def asked(models: Path, runs: dict[str, Path], merged: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    out = tmp_path_factory.mktemp("stranger") / "out"
    folders = [str(run / "model") for run in runs.values()]
    folders[-1] += f"={models / 'student'}"  # the adapter and its base
    command = [sys.executable, "-c", STRANGER, str(out), *folders, str(merged)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return torch.load(out)


def student_at(directory: Path, step: int) -> torch.nn.Module:
    """The student as the checkpoint holds it."""
    run = Run.load(directory / "run.toml")
    model = load_model(run.student, "student", torch.device("cpu"))
    if run.student.lora is not None:
        model = add_adapter(model, run.student.lora, run.seed).eval()
    place = checkpoints.place_of(directory, step)
    checkpoints.load_trained(model, checkpoints.load(place).weights, place)
    return model


def base_logits(models: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(models / "student").eval()(ids_BT).logits


@pytest.mark.parametrize("case", ["tropd", "bfloat16", "lora"])
def test_plain_transformers_and_peft_read_the_student_that_was_trained(
    case: str, models: Path, runs: dict[str, Path], asked: Asked
) -> None:
    ids_BT, logits_BTV, prompt = asked[str(runs[case] / "model")]
    assert prompt == "<|user|>1+1=<|end|><|assistant|>", "tokenizer and chat template came along"
    with torch.no_grad():
        assert torch.equal(logits_BTV, student_at(runs[case], 6)(ids_BT).logits)
    assert (logits_BTV.float() - base_logits(models, ids_BT)).abs().max() > 1e-3, "and it is not the base"


def test_merging_an_adapter_changes_nothing(runs: dict[str, Path], merged: Path, asked: Asked) -> None:
    assert not (runs["lora"] / "model" / "model.safetensors").exists(), "an adapter, not a copy of the base"
    logits_BTV, merged_BTV = asked[str(runs["lora"] / "model")][1], asked[str(merged)][1]
    torch.testing.assert_close(merged_BTV, logits_BTV, rtol=1e-5, atol=1e-5)


def test_merging_what_is_no_adapter_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter_config"):
        merge(models / "student", tmp_path / "merged", device=torch.device("cpu"))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(ConfigError, match="gone"):
        merge(adapter, tmp_path / "merged", device=torch.device("cpu"))


def test_the_card_says_how_the_model_was_made_and_how_well_it_does(models: Path, runs: dict[str, Path]) -> None:
    directory = runs["tropd"]
    card = (directory / "model" / "README.md").read_text()
    versions = (tropd.__version__, torch.__version__, transformers.__version__)
    wanted = ("`tropd`", "2606.01249", str(models / "teacher"), str(models / "four.jsonl"), "| avg@2 |", *versions)
    assert all(text in card for text in wanted), card
    assert Run.load(directory / "model" / "run.toml") == Run.load(directory / "run.toml")


def test_the_card_names_a_base_model_only_where_the_hub_could_know_it(models: Path, tmp_path: Path) -> None:
    local = Run.load(write_run(models, tmp_path / "a"))
    hub = Run.load(write_run(models, tmp_path / "b", student={"path": "Qwen/Qwen3-0.6B"}))
    assert "base_model" not in model_card(local, step=1, results={})
    assert 'base_model: "Qwen/Qwen3-0.6B"' in model_card(hub, step=1, results={})
    assert "Not evaluated." in model_card(hub, step=1, results={})


def test_an_export_that_cannot_be_written_leaves_the_one_before_it(models: Path, tmp_path: Path) -> None:
    run = Run.load(write_run(models, tmp_path / "run"))
    model = load_model(run.student, "student", torch.device("cpu"))
    tokenizer = load_tokenizer(run.student, "student")
    folder = export(model, tokenizer, run, tmp_path / "model", step=1, results={})
    before = {p: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match="file/model"):
        export(model, tokenizer, run, tmp_path / "file" / "model", step=1, results={})
    export(model, tokenizer, run, folder, step=1, results={})
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
