"""What a teacher that only writes will be asked for: calls and tokens, before the first of them is paid."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tropd.config.chat import ChatConfig
from tropd.config.run import Run
from tropd.planning.work import Texts
from tropd.types import READER


@dataclass(frozen=True, kw_only=True)
class Calls:
    """In a step, if every answer has the greatest length and its chunks are spread evenly."""

    number: float
    read: float
    """Tokens of the student's: prompts and beginnings of answers."""
    written: float
    """Tokens, at most."""

    @property
    def tokens(self) -> float:
        return self.read + self.written


def calls_of(run: Run, texts: Texts) -> Calls | None:
    """None where the teacher is not asked for continuations."""
    audit = run.method.objective.audit_of(READER)
    if audit is None:
        return None
    size = min(audit.tokens, texts.new)
    number = texts.rollouts * min(audit.chunks, texts.new // size) * audit.continuations
    start = (texts.new - size) / 2
    return Calls(number=number, read=number * (texts.prompt + start), written=number * size)


def budget_said(run: Run, calls: Calls) -> Iterator[str]:
    """Whether the run stops at its budget."""
    chat = run.teacher.chat or ChatConfig()
    limits = (("calls", chat.max_calls, calls.number), ("tokens", chat.max_tokens, calls.tokens))
    for what, most, each in limits:
        if most is not None and most < each * run.steps:
            yield (
                f"The run stops in about step {int(most / each)} of {run.steps}: teacher.chat.max_{what} is {most:,}, "
                f"and the whole run needs about {each * run.steps:,.0f}."
            )
    if not any(most for _, most, _ in limits):
        yield "Nothing limits the teacher's calls: at teacher.chat.max_calls or max_tokens the run would stop."
