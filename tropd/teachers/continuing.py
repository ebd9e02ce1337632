"""Continuations of the student's answers by a chat endpoint, within a budget.

A continuation that the endpoint does not give (empty, refused, filtered) is missing: `Finish.ABORT` and no tokens.  An
endpoint that gives no answer at all, or does not let us in, is an error.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tropd.base.writing import write_whole
from tropd.config.chat import ChatConfig
from tropd.errors import BudgetSpent, ServerError, ServerGarbled, ServerRefused, TeacherError
from tropd.rollout.engine import Engine
from tropd.servers.dialect import Reply
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.teachers.server import said_by
from tropd.types import Completion, Finish, Message, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONTINUE = "Continue your answer exactly where it stops. Write only what comes next, and repeat nothing of it."
OF_A_TEXT = (400, 403, 413, 422, 451)
"""Statuses with which a server may refuse one text and take others."""
MISSING = Completion(token_ids=(), behavior_logprobs=(), model_logprobs=(), finish=Finish.ABORT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passage(Request):
    """A request to go on with an answer; `token_ids` are the prompt and the answer so far."""

    messages: tuple[Message, ...]
    so_far: str
    """The answer so far."""


@dataclass(kw_only=True)
class Spent:
    """What a teacher has cost so far, kept in a file: also what was asked before the run was stopped or killed."""

    path: Path
    calls: int = 0
    tokens: int = 0

    @classmethod
    def read(cls, path: Path) -> Spent:
        try:
            return cls(path=path, **json.loads(path.read_text()))
        except FileNotFoundError:
            return cls(path=path)
        except (OSError, ValueError, TypeError) as error:
            raise TeacherError(
                f"what the teacher has cost so far is kept in {path}, which cannot be read: {error}. Mend it, or "
                "delete it to count from 0 again."
            ) from error

    def add(self, calls: int, tokens: int) -> None:
        self.calls, self.tokens = self.calls + calls, self.tokens + tokens
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, json.dumps({"calls": self.calls, "tokens": self.tokens}))
        except OSError as error:
            raise TeacherError(f"what the teacher costs cannot be kept in {self.path}: {error}.") from error


class ChatContinuations(Engine):
    """Asks a chat endpoint to go on.  `path` keeps what it costs; `share` is the part of the budget that is this
    process's."""

    def __init__(
        self,
        pool: Pool,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        config: ChatConfig,
        path: Path,
        name: str = "default",
        share: int = 1,
    ) -> None:
        """`tokenizer` is the student's."""
        self.pool, self.model, self.tokenizer, self.config, self.name = pool, model, tokenizer, config, name
        self.spent = Spent.read(path)
        self.most_calls, self.most_tokens = (
            None if most is None else most // share for most in (config.max_calls, config.max_tokens)
        )
        self.why = ""
        """Why the last one is missing that is missing."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        jobs = [self._job(number, request) for number, request in enumerate(requests)]
        self._spend(len(jobs), sum(job.num_tokens for job in jobs))
        before = self._sent
        with said_by(self.name):
            try:
                return self.pool.run(jobs)
            finally:
                if (again := self._sent - before - len(jobs)) > 0:  # requests that were repeated cost as well
                    self.spent.add(again, again * sum(job.num_tokens for job in jobs) // len(jobs))

    def close(self) -> None:
        self.pool.close()

    @property
    def _sent(self) -> int:
        tally = self.pool.tally
        return tally.answers + tally.failures + tally.garbled

    def _spend(self, calls: int, tokens: int) -> None:
        """Count requests before they are sent, or stop."""
        spent = self.spent
        for what, most, now, more in (
            ("calls", self.most_calls, spent.calls, calls),
            ("tokens", self.most_tokens, spent.tokens, tokens),
        ):
            if most is not None and now + more > most:
                raise BudgetSpent(
                    f"teacher {self.name}: {now:,} of {most:,} {what} are spent (teacher.chat.max_{what}), and the "
                    f"next requests need {more:,}. Everything that was written is kept and is not asked again. To go "
                    f"on, raise max_{what} in the run's run.toml and resume the run."
                )
        spent.add(calls, tokens)

    def _job(self, number: int, request: Request) -> Job[Completion]:
        assert isinstance(request, Passage)
        messages = request.messages
        if request.so_far:
            messages = (*messages, Message(role="assistant", content=request.so_far))
            if self.config.continues == "ask":
                messages = (*messages, Message(role="user", content=CONTINUE))
        dialect = dialect_of(self.pool.settings)
        job = dialect.chat_job(f"continuation {number}", self.model, messages, request)
        if request.so_far and self.config.continues == "prefill" and job.body is not None:
            job = replace(job, body={**job.body, **dialect.goes_on})
        return replace(job.then(lambda reply: self._read(reply, request)), otherwise=self._otherwise)

    def _read(self, reply: Reply, request: Request) -> Completion:
        if not reply.content.strip():
            raise ServerGarbled("an answer holds nothing but spaces.")
        ids = self.tokenizer.encode(reply.content, add_special_tokens=False)[: request.max_new_tokens]
        finish = Finish.STOP if reply.ended else Finish.LENGTH
        return Completion(token_ids=tuple(ids), behavior_logprobs=(), model_logprobs=(), finish=finish)

    def _otherwise(self, failure: ServerError) -> Completion | None:
        if isinstance(failure, ServerRefused) and failure.status not in OF_A_TEXT:
            return None
        self.why = str(failure)
        return MISSING
