"""Random models of the sizes that benchmarks need."""

from __future__ import annotations

import torch
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM


def qwen3(
    vocab_size: int, *, width: int, inner: int, layers: int, heads: tuple[int, int], tied: bool = False, seed: int = 0
) -> Qwen3ForCausalLM:
    """`inner` is the width inside the MLP; `heads` are those of queries and of keys, 64 numbers each."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    return Qwen3ForCausalLM(config)
