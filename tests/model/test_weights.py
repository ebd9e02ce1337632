"""A model trains, teaches and answers only with the weights of its files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.one_step import parts_of
from tests.small_runs import run_of, save_model, write_models, write_run
from tests.tiny import tiny_model
from tropd.checkpoints.trained import load_student
from tropd.cli.main import main
from tropd.config.models import ModelConfig
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.model.loading import load_model
from tropd.run.start import resume, train

CPU = torch.device("cpu")


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny_model("llama"),
    "qwen3": lambda: tiny_model("qwen3"),
    "qwen3, tied": lambda: tiny_model("qwen3", tied=True),
    "gpt2": lambda: tiny_model("gpt2", tied=True),
    "gpt_neox": lambda: tiny_model("gpt_neox"),
    "gemma2": lambda: tiny_model("gemma2", tied=True),
}


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor], str], Any], file: str = "model") -> str:
    """Change the tensors of a folder; the name of one in its second layer, which the change is about."""
    path = folder / f"{file}.safetensors"
    tensors = load_file(path)
    name = next(n for n in sorted(tensors) if ".1." in n and tensors[n].dim() == 2)
    change(tensors, name)
    save_file(tensors, path, metadata={"format": "pt"})
    return name


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    number = values.pop("layers", config[layers])
    kinds = {"layer_types": (config["layer_types"] * 2)[:number]} if config.get("layer_types") else {}
    path.write_text(json.dumps({**config, layers: number, **kinds, **values}))


def lose(folder: Path) -> str:
    return rf"1 tensors are missing \({change_tensors(folder, lambda tensors, name: tensors.pop(name))}\)"


def rename(folder: Path) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors["old." + name] = tensors.pop(name)

    name = change_tensors(folder, change)
    return rf"1 tensors are missing \({name}\); 1 tensors belong nowhere \(old.{name}\)"


def reshape(folder: Path) -> str:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = torch.zeros(7, 5)

    return rf"1 tensors have another shape \({change_tensors(folder, change)}: \[7, 5\] instead of "


def add_layer(folder: Path) -> str:
    change_config(folder, layers=3)
    return r"tensors are missing \(\w+\.\w+\.2\..*, \.\.\.\)\. What is not read would be random"


def drop_layer(folder: Path) -> str:
    change_config(folder, layers=1)
    return r"tensors belong nowhere \(\w+\.\w+\.1\."


FAULTS = [lose, rename, reshape, add_layer, drop_layer]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("family", MODELS)
def test_weights_that_do_not_fit_are_refused_by_their_names(family: str, fault: Any, tmp_path: Path) -> None:
    MODELS[family]().save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path))
    load_model(config, "student", CPU)
    words = fault(tmp_path)
    with pytest.raises(ConfigError, match=words):
        load_model(config, "student", CPU)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_head_that_is_neither_there_nor_tied_is_refused(family: str, tmp_path: Path) -> None:
    MODELS[family]().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors, _: tensors.pop("lm_head.weight"))
    with pytest.raises(ConfigError, match=r"missing \(lm_head.weight\)"):
        load_model(ModelConfig(path=str(tmp_path)), "teacher", CPU)
    change_config(tmp_path, tie_word_embeddings=True)
    model = load_model(ModelConfig(path=str(tmp_path)), "teacher", CPU)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_an_architecture_declares_needless_is_no_fault(tmp_path: Path) -> None:
    """Masks and frequencies that older versions wrote beside the weights."""
    for family, name in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        folder = tmp_path / family
        MODELS[family]().save_pretrained(folder)
        change_tensors(folder, lambda tensors, _, name=name: tensors.update({name: torch.ones(4)}))
        load_model(ModelConfig(path=str(folder)), "student", CPU)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_neither_training_nor_resuming_begins_with_weights_that_do_not_fit(whose: str, tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    run = run_of(folder, {"name": "opd"}, steps=1)
    train(run)
    change_config(folder / whose, layers=3)
    with pytest.raises(ConfigError, match=f"weights of the {whose} .* do not fit Qwen3ForCausalLM"):
        resume(folder / "run", step=1)
    with pytest.raises(ConfigError, match=f"weights of the {whose} .* do not fit Qwen3ForCausalLM"):
        train(run_of(folder, {"name": "opd"}, output=str(folder / "other")))


def test_neither_doctor_nor_evaluation_nor_export_uses_weights_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_models(tmp_path)
    path = write_run(folder, folder / "run", "short", method={"name": "opd"}, steps=1)
    train(Run.load(path))
    change_config(folder / "student", layers=3)
    asks = [
        ["doctor", str(path), "--json", "--output", str(folder / "new")],
        ["export", str(folder / "run"), "-o", str(folder / "exported")],
        ["evaluate", str(folder / "student"), "--data", str(folder / "data.jsonl"), "--grader", "exact"],
    ]
    for ask in asks:
        assert main(ask) != 0
        said = "".join(capsys.readouterr())
        assert "do not fit Qwen3ForCausalLM" in said, said
    assert not (folder / "exported").exists()


def test_an_adapter_that_lacks_a_tensor_is_neither_evaluated_nor_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_models(tmp_path)
    student = {"path": str(folder / "student"), "lora": {"rank": 2, "alpha": 4}}
    train(run_of(folder, {"name": "opd"}, steps=1, student=student))
    adapter = folder / "run" / "model"
    load_student(str(adapter), None, "cpu", "auto")
    name = change_tensors(adapter, lambda tensors, name: tensors.pop(name), "adapter_model")
    with pytest.raises(ConfigError, match=rf"1 tensors are missing \({name}\)"):
        load_student(str(adapter), None, "cpu", "auto")
    assert main(["merge", str(adapter), "-o", str(folder / "merged")]) != 0
    assert "does not fit its adapter_config.json" in capsys.readouterr().err
    assert not (folder / "merged").exists()


def test_a_whole_model_passes_in_every_precision_and_its_doctor_too(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    for dtype in ("float32", "bfloat16"):
        assert parts_of(folder, student={"path": str(folder / "student"), "dtype": dtype}).model is not None
    save_model(folder / "half", tiny_model("qwen3", seed=2).half())
    load_model(ModelConfig(path=str(folder / "half")), "teacher", CPU)
