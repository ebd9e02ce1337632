"""Random models of several families, built so that their distributions are not flat."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config

from tests.tiny import VOCAB, tiny_config

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
)


def sliding_gemma2():
    config = tiny_config("gemma2")
    config.sliding_window = 8
    return config


FAMILIES = {
    **{family: tiny_config(family) for family in ("qwen3", "llama", "gpt2", "gemma2", "granite", "cohere")},
    "gemma2 beyond its window": sliding_gemma2(),
    "gpt-neox": GPTNeoXConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE, num_key_value_heads=2),
    "mistral beyond its window": MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=8),
}


def make(config: Any, sharp: float = 16.0) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(sharp if parameter.dim() > 1 else 1.0)
    return model
