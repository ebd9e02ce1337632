"""Responses that begin with the same tokens."""

from __future__ import annotations

from dataclasses import dataclass

from tropd import RolloutPolicy
from tropd.base.ranges import Count
from tropd.methods.drafts import Draft, RolloutJob, Text, Writer
from tropd.types import Finish


@dataclass(frozen=True, kw_only=True)
class Opened(RolloutPolicy):
    """Every second response begins with a token that is given."""

    token: Count = 65

    def begin(self, job: RolloutJob, writer: Writer | None) -> list[Draft]:
        opening = Text((self.token,) * 2, Finish.LENGTH)
        return [draft.begun(opening, 1, job.max_new_tokens) if draft.number % 2 else draft for draft in job.drafts()]
