"""Models that are near each other or lean to some tokens, and graders that are of no use."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.tiny import byte_tokenizer, tiny_model


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
