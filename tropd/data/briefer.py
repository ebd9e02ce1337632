"""Prompts as their teachers read them, where a teacher is told more than the student.

The student's prompt and the response stay as they are.  What cannot be told is refused with the number of its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tropd.base.reading import nearest
from tropd.briefings.briefing import AsStudent, Briefing, OwnBriefing
from tropd.config.models import TeacherConfig
from tropd.config.stages import DataConfig
from tropd.data import chat
from tropd.data.rows import Row, Table
from tropd.errors import ConfigError, DataError
from tropd.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 60
"""Characters of the end of a prompt."""


@dataclass(frozen=True, kw_only=True)
class _Listener:
    """A teacher that is told something."""

    said: str
    briefing: Briefing
    tokenizer: PreTrainedTokenizerBase
    room: int | None
    """Tokens that its prompt may have."""


class Briefer:
    """Adds to prompts what their teachers read."""

    def __init__(
        self,
        teachers: Mapping[str, TeacherConfig],
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        tokenizers: Mapping[str, PreTrainedTokenizerBase | None],
        contexts: Mapping[str, int | None],
        max_new_tokens: int,
    ) -> None:
        """By a teacher's name: its tokenizer (None where it is the student's) and how much it can read."""
        self.data, self.tokenizer = data, tokenizer
        self.listeners: dict[str, _Listener] = {}
        for name, config in teachers.items():
            briefing = config.briefing.imported() if isinstance(config.briefing, OwnBriefing) else config.briefing
            if isinstance(briefing, AsStudent):
                continue
            own, context = tokenizers.get(name), contexts.get(name)
            self.listeners[name] = _Listener(
                said="the teacher" if name == "default" else f"teacher {name!r}",
                briefing=briefing,
                tokenizer=own if own is not None and own.chat_template else tokenizer,
                room=None if context is None else context - max_new_tokens,
            )

    def check(self, table: Table, uses_template: bool) -> None:
        """Refuse a data set that lacks a column, and text without turns for what needs them."""
        for listener in self.listeners.values():
            for column in listener.briefing.columns:
                if column not in table.columns:
                    has = f"{nearest(column, table.columns)}; it has {', '.join(table.columns)}"
                    raise DataError(
                        f"{listener.said} is told what stands in column '{column}', but {table.source} has none"
                        f"{has}. Set briefing.column in the section of the teacher."
                    )
            if listener.briefing.needs_template and not uses_template:
                raise ConfigError(
                    f"{listener.said} is told a turn of a conversation, but prompts are encoded without a chat "
                    "template. Use a tokenizer with one and data.apply_chat_template = true, or leave the briefing out."
                )

    def brief(self, prompt: Prompt, row: Row, text: str, number: int) -> Prompt:
        """The prompt with what its teacher reads; `text` is that of a prompt without turns."""
        listener = self.listeners.get(prompt.teacher)
        if listener is None:
            return prompt
        try:
            told_ids = self._render(listener, prompt, row, text)
        except DataError as problem:
            raise DataError(
                f"row {number}: {listener.said} cannot be told more than the student: {problem}. Repair the row, or "
                "change the briefing in the section of the teacher."
            ) from None
        return replace(prompt, told_ids=told_ids)

    def _render(self, listener: _Listener, prompt: Prompt, row: Row, text: str) -> tuple[int, ...]:
        messages = prompt.messages or (Message(role="user", content=text),)
        told = tuple(listener.briefing.messages(messages, row))
        if prompt.messages:
            kwargs = self.data.chat_template_kwargs
            ids = chat.render(told, listener.tokenizer, kwargs=kwargs)
            openings = (
                chat.opening(messages, self.tokenizer, kwargs=kwargs),
                chat.opening(told, listener.tokenizer, kwargs=kwargs),
            )
            alike = openings[0] == openings[1]
        else:
            ids = chat.encode_plain(told[-1].content, listener.tokenizer)
            alike = len(told) == 1 and told[0].content.endswith(text)
        if not alike or ids[-1:] != prompt.token_ids[-1:]:
            ends = [repr(str(self.tokenizer.decode(list(end)))[-_SHOWN:]) for end in (prompt.token_ids, ids)]
            raise ConfigError(
                f"{listener.said} would not begin its answer where the student does: the student's prompt ends with "
                f"{ends[0]}, the teacher's with {ends[1]}. "
                + (
                    "Give both the same chat template, or set data.chat_template_kwargs so that both open the "
                    "assistant's turn alike."
                    if prompt.messages
                    else "Without a chat template, {prompt} has to be the end of briefing.template."
                )
            )
        if listener.room is not None and len(ids) > listener.room:
            raise DataError(
                f"its prompt has {len(ids)} tokens, and at most {listener.room} leave room for the answer "
                "(rollout.max_new_tokens) in what it can read"
            )
        return ids
