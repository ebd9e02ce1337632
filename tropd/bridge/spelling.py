"""Where tokens end in a text.

    drawn ids   --decoded-->  text, and after which token the text stands at which character
    text        --encoded-->  ids,  and after which token the text stands at which character

A token may end inside a character (bytes), change what is in front of it (a decoder that joins pieces) or stand for no
character at all.  It has no end of its own then, and belongs to a longer piece.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropd.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BROKEN = "\ufffd"
"""What a decoder writes for bytes that are no character."""
_MARK = "\u0301"
_BACK = 6
"""Tokens in front that a piece is decoded with: decoders treat the first token of a text otherwise."""


@dataclass(frozen=True, slots=True)
class Spelled:
    """A text and its tokens."""

    text: str
    token_ids: tuple[int, ...]
    ends: tuple[int | None, ...]
    """By token: how many characters of the text are written after it; None where that is no whole number."""


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of ids, character by character as the tokenizer writes it."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def spelled(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> Spelled:
    """The text of ids that a model drew."""
    text = decode(tokenizer, ids)
    ends: list[int | None] = []
    start, place, known = 0, 0, 0  # tokens from `start` on are decoded together; at `place` the text stands at `known`
    for t in range(1, len(ids) + 1):
        before, after = decode(tokenizer, ids[start:place]), decode(tokenizer, ids[start:t])
        written = after[len(before) :]
        fits = after.startswith(before) and text.startswith(written, known)
        # What ends in a broken character may be the beginning of one, unless nothing comes after it.
        if not fits or (written.endswith(BROKEN) and t < len(ids)):
            ends.append(None)
            continue
        known += len(written)
        ends.append(known)
        start, place = max(place - _BACK, 0) if t - start > 2 * _BACK else start, t
    if ends:
        ends[-1] = len(text)
    return Spelled(text=text, token_ids=tuple(ids), ends=tuple(ends))


def encoded(tokenizer: PreTrainedTokenizerBase, text: str, after: str = "") -> Spelled:
    """A text as this tokenizer cuts it behind another text; as it cuts it alone, where a token would reach across."""
    ids, spans = _cut(tokenizer, after + text)
    first = next((n for n, (start, end) in enumerate(spans) if start >= len(after) and end > len(after)), len(ids))
    if after and first and spans[first - 1][1] > len(after):
        return encoded(tokenizer, text)
    own = [(start - len(after), end - len(after)) for start, end in spans[first:]]
    starts = [*(start for start, _ in own), len(text)][1:]
    if _composes(tokenizer):  # it reads a letter and its accent as one, but says that a token ends between them
        own = [(start, _past_marks(text, end, limit)) for (start, end), limit in zip(own, starts, strict=True)]
    ends: list[int | None] = [end if start >= end else None for (_, end), start in zip(own, starts, strict=True)]
    if ends:
        ends[-1] = len(text)  # what no token writes, such as spaces at the end, belongs to the last one
    return Spelled(text=text, token_ids=tuple(ids[first:]), ends=tuple(ends))


def _composes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer joins characters before it cuts them."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    normalizer = getattr(backend, "normalizer", None)
    return normalizer is not None and _MARK not in normalizer.normalize_str("e" + _MARK)


def _past_marks(text: str, end: int, limit: int) -> int:
    """The end of a token, moved behind the characters that belong to the one in front."""
    while 0 < end < limit and not unicodedata.is_normalized("NFC", text[end - 1 : end + 1]):
        end += 1
    while 0 < end < limit and unicodedata.combining(text[end]):
        end += 1
    return end


def _cut(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise VocabularyError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters a token stands for, which a "
            "bridge between tokenizers needs. Use a fast one (a folder with tokenizer.json)."
        )
    # What a model spelled out in letters is no special token, whatever it is called.
    cut = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    return list(cut["input_ids"]), [(start, end) for start, end in cut["offset_mapping"]]
