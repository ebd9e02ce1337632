"""Configurations of the families whose texts are compared, two of them with prompts beyond their windows."""

from __future__ import annotations

from tests.tiny import tiny_config

FAMILIES = {
    **{family: tiny_config(family) for family in ("qwen3", "llama", "gpt2", "gemma2", "granite", "cohere")},
    "gemma2 beyond its window": tiny_config("gemma2", sliding_window=8),
    "gpt-neox": tiny_config("gpt_neox"),
    "qwen2": tiny_config("qwen2"),
    "mistral beyond its window": tiny_config("mistral", sliding_window=8),
}
