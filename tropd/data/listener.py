"""A reader that is told something, and how a prompt is written for it: it opens the answer's turn as the student's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tropd.briefings.asked import Briefing, Messages
from tropd.config.models import TeacherConfig
from tropd.data import chat
from tropd.errors import ConfigError
from tropd.types import Prompt

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
    briefing: Briefing
    teaches: bool
    """Whether it is the teacher of prompts, which may have to write as well."""
    tokenizer: PreTrainedTokenizerBase
    """Whose chat template writes its prompts."""
    student: PreTrainedTokenizerBase
    kwargs: Mapping[str, Any]
    """Of both chat templates."""
    context: int | None

    def render(self, prompt: Prompt, messages: Messages, told: Messages) -> tuple[int, ...]:
        """The tokens of what it is told, where the student's prompt is of `messages`."""
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
        return ids
