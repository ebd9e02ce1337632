"""A response of the student in the teacher's tokens, with the chunks in which credit comes back.

Special tokens are not text: each stands for itself, and cuts the text into parts.  The token that ends the student's
turn becomes the token that ends the teacher's, whatever they are called.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tropd.bridge.chunks import Chunk, chunks_of, is_read
from tropd.bridge.spelling import BROKEN, decode, encoded, spelled
from tropd.config.bridge import BridgeConfig
from tropd.data import chat
from tropd.errors import VocabularyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OPENING = 4
"""Tokens of the prompt that the response is encoded behind."""


@dataclass(frozen=True, slots=True)
class Translation:
    """What the teacher reads of a response."""

    token_ids: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    """All of them, in order: together they are the response."""
    read: tuple[Chunk, ...]
    """Those that bring credit back."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bridge:
    """Two tokenizers of a run."""

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    config: BridgeConfig

    @cached_property
    def end(self) -> int | None:
        """What ends the teacher's turn."""
        return chat.response_end_id(self.teacher, bool(self.teacher.chat_template))

    @cached_property
    def own_end(self) -> int | None:
        """What ends the student's turn; another stop token is what the teacher has under its name, if anything."""
        return chat.response_end_id(self.student, bool(self.student.chat_template))

    @cached_property
    def special(self) -> Mapping[int, int | None]:
        """The student's special tokens, and what the teacher has for each; None: nothing."""
        own, theirs = _special_of(self.student), {name: index for index, name in _special_of(self.teacher).items()}
        wanted = dict(self.config.special)
        for name, other in wanted.items():
            if name not in own.values() or other not in theirs:
                whose, lacking = ("student", name) if name not in own.values() else ("teacher", other)
                raise VocabularyError(
                    f"bridge.special says that {name!r} of the student is {other!r} of the teacher, but {lacking!r} is "
                    f"no special token of the {whose}."
                )
        return {index: theirs.get(wanted.get(name, name)) for index, name in own.items()}

    @cached_property
    def special_back(self) -> Mapping[int, int | None]:
        """The teacher's special tokens, and what the student has for each; None: nothing."""
        known = {theirs: own for own, theirs in reversed([*self.special.items()]) if theirs is not None}
        return {index: known.get(index) for index in _special_of(self.teacher)}

    def translate(self, response_ids: Sequence[int], prompt_ids: Sequence[int], ended: bool) -> Translation:
        """The response behind the teacher's prompt.  `ended`: its last token ends the turn."""
        ids, chunks, read = list[int](), list[Chunk](), list[Chunk]()
        place = 0
        after = self._opening(prompt_ids)
        for part, special in _parts(response_ids, self.special, ended):
            if special:
                mapped = self.special.get(part[0])
                if ended and place + 1 == len(response_ids) and (mapped is None or part[0] == self.own_end):
                    mapped = self.end
                text, theirs = decode(self.student, part), () if mapped is None else (mapped,)
                found = [Chunk((0, 1), (0, len(theirs)), text)]
                heard = found if theirs else []
            else:
                own = spelled(self.student, part)
                other = encoded(self.teacher, own.text, after)
                theirs, found = other.token_ids, chunks_of(own, other)
                unknown: Any = self.teacher.unk_token_id
                heard = [c for c in found if is_read(c, other, self.config.longest, unknown)]
            shift = (place, len(ids))
            chunks += [c.moved(*shift) for c in found]
            read += [c.moved(*shift) for c in heard]
            ids += theirs
            place += len(part)
            after = ""
        return Translation(token_ids=tuple(ids), chunks=tuple(chunks), read=tuple(read))

    def back(self, token_ids: Sequence[int], ended: bool) -> tuple[int, ...]:
        """A text that the teacher wrote, in the student's tokens.  Special tokens that the student lacks are left out,
        and so is the character in which a text was cut."""
        own, ids = token_ids[:-1] if ended else token_ids, list[int]()
        for part, special in _parts(own, self.special_back, ended=False):
            if special:
                mapped = self.special_back[part[0]]
                ids += [] if mapped is None else [mapped]
            else:
                text = decode(self.teacher, part)
                ids += encoded(self.student, text if ended else text.rstrip(BROKEN)).token_ids
        return (*ids, self.own_end) if ended and self.own_end is not None else tuple(ids)

    def _opening(self, prompt_ids: Sequence[int]) -> str:
        last = [*prompt_ids[-_OPENING:]]
        text = decode(self.teacher, last)
        return text if self.teacher.encode(text, add_special_tokens=False) == last else ""


def _special_of(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """Tokens that stand for themselves, and their names."""
    added = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items()}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def _parts(ids: Sequence[int], special: Container[int], ended: bool) -> Iterator[tuple[tuple[int, ...], bool]]:
    """Stretches of text, and special tokens one by one; `ended`: the last one is special in any case."""
    text: list[int] = []
    for n, index in enumerate(ids):
        if index in special or (ended and n + 1 == len(ids)):
            if text:
                yield tuple(text), False
                text = []
            yield (index,), True
        else:
            text.append(index)
    if text:
        yield tuple(text), False
