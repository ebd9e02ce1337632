"""Tokenizers of several kinds, trained on a few lines here."""

from __future__ import annotations

from functools import cache

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


@cache
def tokenizer_of(kind: str, size: int = 0) -> PreTrainedTokenizerFast:
    """One of KINDS."""
    shared = {"special_tokens": SPECIAL, "show_progress": False}
    if "byte-level" in kind:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        size = size or (300 if "smaller" in kind else 420)
        trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, **shared)
    elif kind == "unigram":
        core = Tokenizer(models.Unigram())
        core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size or 300, unk_token="<unk>", **shared)
    elif kind == "wordpiece":
        core = Tokenizer(models.WordPiece(unk_token="<unk>"))
        core.normalizer = normalizers.BertNormalizer(lowercase=True)
        core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=size or 300, **shared)
    else:
        core = Tokenizer(models.BPE(unk_token="<unk>"))
        core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
        trainer = trainers.BpeTrainer(vocab_size=size or 200, **shared)
    core.train_from_iterator(20 * LINES, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens(
        {"eos_token": "<|eos|>", "unk_token": "<unk>", "additional_special_tokens": SPECIAL[2:]}
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
