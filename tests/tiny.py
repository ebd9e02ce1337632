"""Small real models and a byte-level tokenizer, made on the spot: every test runs on real objects."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.cohere import CohereConfig
from transformers.models.gemma2 import Gemma2Config
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt_neox import GPTNeoXConfig
from transformers.models.granite import GraniteConfig
from transformers.models.llama import LlamaConfig
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


def tiny_config(family: str, vocab: int = VOCAB, tied: bool = False, width: int = 32, layers: int = 2):
    """A two-layer configuration of a model family."""
    common = dict(vocab_size=vocab, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    modern = dict(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=width // 4,
        max_position_embeddings=256,
    )
    if family == "gpt2":
        return GPT2Config(n_embd=width, n_layer=layers, n_head=4, n_positions=256, **common)
    if family == "gpt_neox":
        modern = {name: modern[name] for name in modern if name not in ("num_key_value_heads", "head_dim")}
        return GPTNeoXConfig(**common, **modern)
    cls = {
        "qwen3": Qwen3Config,
        "llama": LlamaConfig,
        "gemma2": Gemma2Config,  # final soft-capping
        "cohere": CohereConfig,  # logit scale
        "granite": GraniteConfig,  # logits divided by a constant
    }[family]
    if family == "cohere":
        modern.pop("head_dim")
    return cls(**common, **modern)


def tiny_model(family: str = "qwen3", seed: int = 0, sharp: float = 16.0, **options):
    """A random model in eval mode; `sharp` scales the weights so that its distributions are not flat."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **options)).eval()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(sharp)
    return model
