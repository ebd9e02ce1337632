"""Tokenizers of several kinds, made of a few lines here and the same in every process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny import CHAT_TEMPLATE

LINES = (
    "The quick brown fox jumps over the lazy dog.",
    "def f(n):\n    return n**2  # ünïcode",
    "汉字 and 日本語 テキスト",
    "مرحبا بالعالم שלום",
    "🙂👩\u200d👩\u200d👧 emoji, e\u0301 and n\u0303 combining",
    "12+30=42; x_1 = 0.5\t\ttabs      spaces\r\n",
)
KINDS = ("byte-level", "smaller byte-level", "unigram", "wordpiece", "characters")
SPECIAL = ["<unk>", "<|eos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]


def _pieces(words: Sequence[str]) -> Counter[str]:
    """How often each stretch of up to five characters occurs."""
    return Counter(w[a:b] for w in words for a in range(len(w)) for b in range(a + 1, min(a + 5, len(w)) + 1))


def _likeliest(counts: Counter[str], size: int) -> list[tuple[str, int]]:
    """All characters, and what saves most."""
    return sorted(counts.items(), key=lambda x: (len(x[0]) > 1, -len(x[0]) * x[1], x[0]))[:size]


@cache
def tokenizer_of(kind: str, size: int = 0) -> PreTrainedTokenizerFast:
    """One of KINDS."""
    trainer: Any = None  # two kinds are made by hand: their trainers break ties otherwise in every process
    shared: Any = {"special_tokens": SPECIAL, "show_progress": False}
    if "byte-level" in kind:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        size = size or (300 if "smaller" in kind else 420)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **shared)
    elif kind == "unigram":
        cut = pre_tokenizers.Metaspace()
        counts = _pieces([word for line in LINES for word, _ in cut.pre_tokenize_str(line)])
        shares = [(piece, math.log(len(piece) * n / len(counts))) for piece, n in _likeliest(counts, size or 300)]
        core = Tokenizer(models.Unigram([*((name, -100.0) for name in SPECIAL), *shares], unk_id=0))
        core.pre_tokenizer, core.decoder = cut, decoders.Metaspace()
    elif kind == "wordpiece":
        lower, cut = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        words = [word for line in LINES for word, _ in cut.pre_tokenize_str(lower.normalize_str(line))]
        begins = _likeliest(_pieces(words), (size or 300) // 2)
        names = [*SPECIAL, *(piece for piece, _ in begins), *(f"##{piece}" for piece, _ in begins)]
        core = Tokenizer(models.WordPiece({name: n for n, name in enumerate(names)}, unk_token="<unk>"))
        core.normalizer, core.pre_tokenizer, core.decoder = lower, cut, decoders.WordPiece()
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=size or 200, **shared)
    if trainer is not None:
        core.train_from_iterator(20 * LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens(
        {"eos_token": "<|eos|>", "unk_token": "<unk>", "additional_special_tokens": SPECIAL[2:]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
