"""Small runs on disk, good and bad: models, tokenizers, data and the file that joins them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import byte_tokenizer, tiny_model
from tropd.config import file as config_file
from tropd.config.run import Run


def save_model(folder: Path, *, tokenizer: Any = None, **options: Any) -> Path:
    model = tiny_model(**{"family": "qwen3", "tied": True, "sharp": 4.0, **options})
    model.save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]] | None = None) -> Path:
    rows = rows or [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_world(folder: Path) -> Path:
    """A student, a stronger teacher and a data set."""
    save_model(folder / "student", seed=0)
    save_model(folder / "teacher", seed=1)
    write_rows(folder / "data.jsonl")
    return folder


def values_of(world: Path, output: Path, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "output": str(output),
        "student": {"path": str(world / "student")},
        "teacher": {"path": str(world / "teacher")},
        "data": {"path": str(world / "data.jsonl")},
        "method": {"name": "tropd", "top_k": 8, "beta": 0.1},
        "rollout": {"num_prompts": 2, "num_rollouts": 2, "max_new_tokens": 12, "save_every": 1},
        "checkpoint": {"every": 1},
        "optimizer": {"learning_rate": 1e-3},
        "alarms": {"support_collapse": "off"},
        "grader": "exact",
        "steps": 2,
        "tokens_per_micro_batch": 256,
        "device": "cpu",
    }
    return {**values, **changes}


def run_of(world: Path, output: Path, **changes: Any) -> Run:
    return config_file.build(values_of(world, output, **changes), "test")


def write_run(world: Path, output: Path, **changes: Any) -> Path:
    """The file of a run, beside the folder that the run would make."""
    path = output.with_name(output.name + ".toml")
    path.write_text(config_file.dump(run_of(world, output, **changes)))
    return path


def perturb(source: Path, target: Path, noise: float, seed: int = 7) -> Path:
    """A model near another one: they agree on most tokens."""
    model = AutoModelForCausalLM.from_pretrained(source)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * parameter.abs().mean() * torch.randn_like(parameter))
    model.save_pretrained(target)
    byte_tokenizer().save_pretrained(target)
    return target


def save_leaning(folder: Path, logits: dict[str, float]) -> Path:
    """A model that adds constants to the logits of some tokens, by name."""
    tokenizer = byte_tokenizer()
    model = tiny_model("gpt2", seed=0, sharp=1.0)
    with torch.no_grad():
        model.transformer.ln_f.bias.zero_()[0] = 1.0
        model.transformer.ln_f.weight[0] = 0.0
        for token, logit in logits.items():
            model.lm_head.weight[tokenizer.convert_tokens_to_ids(token)].zero_()[0] = logit
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def grumpy(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """A grader that likes nothing."""
    return [0.0] * len(completions)


def broken(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    raise RuntimeError("no internet")
