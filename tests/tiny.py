"""Small real models and a byte-level tokenizer, made on the spot: every test runs on real objects."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>"]
VOCAB = 256 + len(SPECIAL)


def byte_tokenizer(vocab: int = VOCAB) -> PreTrainedTokenizerFast:
    """One token per byte, six special tokens, a chat template; then tokens that no text is made of, up to `vocab`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rare = [f"<{number}>" for number in range(vocab - VOCAB)]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, *rare])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens(
        {"pad_token": "<|pad|>", "eos_token": "<|eos|>", "additional_special_tokens": SPECIAL[1:2] + SPECIAL[3:]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


CONFIGS = {
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "gpt_neox": GPTNeoXConfig,
    "gemma2": Gemma2Config,  # final soft-capping
    "cohere": CohereConfig,  # logit scale
    "granite": GraniteConfig,  # logits divided by a constant
}


def tiny_config(family: str, vocab: int = VOCAB, tied: bool = False, width: int = 32, layers: int = 2, **fields: Any):
    """A two-layer configuration of a model family; `fields` are those of its own."""
    common = dict(vocab_size=vocab, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=256, **common, **fields)
    shape = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    if family != "gpt_neox":
        shape["num_key_value_heads"] = 2
    if family in ("qwen3", "llama", "gemma2", "granite"):
        shape["head_dim"] = width // 4
    return CONFIGS[family](**{**common, **shape, **fields})


def random_model(config: Any, seed: int = 0, sharp: float = 16.0) -> Any:
    """A random model in eval mode; `sharp` scales the weights so that its distributions are not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharp)
    return model


def tiny_model(family: str = "qwen3", seed: int = 0, sharp: float = 16.0, **options: Any) -> Any:
    return random_model(tiny_config(family, **options), seed, sharp)
