"""A tokenizer with one token per word of a task."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tropd.testbeds.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNKNOWN = SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")


def vocabulary_of(task: Task) -> dict[str, int]:
    return {word: number for number, word in enumerate((*SPECIAL, *task.words))}


def num_rows(task: Task) -> int:
    """Rows of the embedding: the vocabulary, filled up to a multiple of 32."""
    return -(-len(vocabulary_of(task)) // 32) * 32


def make_tokenizer(task: Task) -> PreTrainedTokenizerFast:
    """Texts begin with <bos>, and no chat template is there: a prompt is continued as it stands."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = vocabulary_of(task)
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    if task.space:
        core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    else:
        whole = [re.escape(word) for word in task.words if len(word) > 1]
        core.pre_tokenizer = pre_tokenizers.Split(Regex("|".join((*whole, "."))), "isolated")  # type: ignore[assignment]
        core.decoder = decoders.Fuse()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )
