"""A teacher that only writes: `[teacher.chat]` in a run file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, NotNegative, Ranged


@dataclass(frozen=True, kw_only=True)
class ChatConfig(Ranged):
    """The teacher is a chat endpoint that continues the student's answers, and what that may cost."""

    section = "teacher.chat"

    continues: Literal["prefill", "ask"] = "prefill"
    """How it is given the beginning of an answer: as the assistant's unfinished turn, which the endpoint must support,
    or as a finished one that the user then asks it to continue."""
    temperature: NotNegative = 1.0
    """Of its continuations. At least 0."""
    max_calls: Count | None = None
    """The most requests of the whole run; before the next one it stops. At least 1."""
    max_tokens: Count | None = None
    """The most tokens of the whole run, read and written, counted as the student's and as if each answer had the
    greatest length; before the next request it stops. At least 1."""
