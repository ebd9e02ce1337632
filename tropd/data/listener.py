"""A reader that is told something, and how a prompt is written for it: it opens the answer's turn as the student's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropd.base.reading import shortened
from tropd.briefings.asked import Asked, Briefing, Messages
from tropd.config.models import TeacherConfig
from tropd.data import chat
from tropd.errors import ConfigError, DataError, TropdError
from tropd.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 60
"""Characters of the end of a prompt."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Whoever reads responses, as far as a briefing has to know."""

    config: TeacherConfig
    tokenizer: PreTrainedTokenizerBase | None = None
    """None where it is the student's."""
    context: int | None = None
    """How many tokens it can read."""


@dataclass(frozen=True, kw_only=True)
class Listener:
    """A reader that is told something."""

    said: str
    section: str
    """Of the run file, where its briefing stands."""
    briefing: Briefing
    teaches: bool
    """Whether it is the teacher of prompts, which may have to write as well."""
    tokenizer: PreTrainedTokenizerBase
    """Whose chat template writes its prompts."""
    student: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    """Of both chat templates."""
    context: int | None
    bridged: bool = False
    """Whether that tokenizer is another one than the student's."""

    def render(self, prompt: Prompt, messages: Messages, told: Messages) -> tuple[int, ...]:
        """The tokens of what it is told, where the student's prompt is of `messages`."""
        if self.bridged:
            return self._in_its_own_words(prompt, told)
        if prompt.messages:
            ids = chat.render(told, self.tokenizer, kwargs=self.kwargs)
            opening = chat.opening(messages, self.student, kwargs=self.kwargs)
            alike = opening == chat.opening(told, self.tokenizer, kwargs=self.kwargs)
        else:
            ids = chat.encode_plain(told[-1].content, self.tokenizer)
            alike = len(told) == 1 and told[0].content.endswith(messages[-1].content)
        if not alike or ids[-1:] != prompt.token_ids[-1:]:
            ends = [repr(str(self.student.decode(list(end)))[-_SHOWN:]) for end in (prompt.token_ids, ids)]
            raise ConfigError(
                f"{self.said} would not begin its answer where the student does: the student's prompt ends with "
                f"{ends[0]}, the teacher's with {ends[1]}. "
                + (
                    "Give both the same chat template, or set data.chat_template_kwargs so that both open the "
                    "assistant's turn alike."
                    if prompt.messages
                    else "Without a chat template, {prompt} has to be the end of briefing.template."
                )
            )
        if told != messages and ids == self._unbriefed(prompt, messages):
            raise ConfigError(
                f"{self.said} is told more than the student, but its chat template leaves that out: both would read "
                f"{str(self.student.decode(list(ids)))[-_SHOWN:]!r}. Put it into the user's turn (briefing kind "
                "'column'), or give the reader a chat template that writes it."
            )
        cut = chat.cut_short(told, self.tokenizer, kwargs=self.kwargs) if prompt.messages and told != messages else None
        if cut is not None:
            raise ConfigError(
                f"{self.said} is told {shortened(repr(cut.content))} in the {cut.role}'s turn, but its chat template "
                "does not write that in full. Give it a chat template that does, or tell it less."
            )
        return ids

    def _in_its_own_words(self, prompt: Prompt, told: Messages) -> tuple[int, ...]:
        """The same conversation with the teacher's own template and tokens."""
        if not prompt.messages:
            return chat.encode_plain(told[-1].content, self.tokenizer)
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"{self.said} has a tokenizer of its own without a chat template, but prompts are conversations. Set "
                "its `tokenizer` to a folder whose tokenizer has one, or data.apply_chat_template = false."
            )
        if (cut := chat.cut_short(told, self.tokenizer, kwargs=self.kwargs)) is not None:
            raise ConfigError(
                f"{self.said} is to read {shortened(repr(cut.content))} in the {cut.role}'s turn, but its chat "
                "template does not write that in full. Give it a chat template that does."
            )
        return chat.render(told, self.tokenizer, kwargs=self.kwargs)

    def _unbriefed(self, prompt: Prompt, messages: Messages) -> tuple[int, ...]:
        """What it would read if it were told nothing."""
        if self.tokenizer is self.student:
            return prompt.token_ids
        if not prompt.messages:
            return chat.encode_plain(messages[-1].content, self.tokenizer)
        return chat.render(messages, self.tokenizer, kwargs=self.kwargs)

    def messages(self, asked: Asked) -> Messages | None:
        """What its briefing says, which may be anybody's code."""
        said = f"briefing {type(self.briefing).__name__}"
        try:
            told = self.briefing.messages(asked)
        except TropdError:
            raise
        except Exception as error:
            raise DataError(f"{said} fails with {type(error).__name__}: {error}") from error
        if told is None:
            return None
        if not isinstance(told, list | tuple) or not told or not all(isinstance(x, Message) for x in told):
            raise DataError(
                f"{said} returns {told!r:.80}, and a tuple of tropd.types.Message is asked for, or None where there is "
                "nothing to tell"
            )
        return tuple(told)
