"""Requests to a kind of server, as jobs of a pool; each kind is a subclass of `Dialect`.

A dialect of your own is a subclass: it builds the jobs, names the evidence that its scores give, and has one sentence
for everything that it cannot do.  No other code in tropd depends on the kind of a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import TypedDict

from tropd.errors import ServerGarbled, ServerRefused
from tropd.objective.evidence import Needs
from tropd.servers.answers import Scored, parsed
from tropd.servers.pool import Job, Pool
from tropd.types import Completion, Message, Request


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """The answer of a chat endpoint."""

    content: str
    ended: bool
    """Whether the answer ended before the token limit."""


class Weights(Protocol):
    """How a kind of server takes new weights, and how it sleeps in between.  Each pool has one server."""

    sleep_advice: str
    """How to start a server that can sleep."""

    def give(self, pool: Pool, folder: Path) -> None:
        """Have the server read weights from a shared folder."""
        ...

    def forget(self, pool: Pool) -> None:
        """Clear caches, so that results of the old weights are not continued with the new ones."""
        ...

    def give_adapter(self, pool: Pool, name: str, folder: Path) -> None:
        """Have the server load an adapter under a name, in place of an earlier one."""
        ...

    def drop_adapter(self, pool: Pool, name: str) -> None: ...

    def advice(self, adapter: bool) -> str:
        """How to start a server that takes weights."""
        ...

    def serving(self, rank: int | None) -> tuple[list[str], dict[str, str]]:
        """Flags and variables to start such a server; `rank` is the adapters'."""
        ...

    def sleep(self, pool: Pool, adapter: bool) -> None:
        """Have the server free its GPU memory.  It loses its weights; with an adapter it keeps the base's."""
        ...

    def waking(self, pool: Pool, adapter: bool) -> AbstractContextManager[None]:
        """Wake the server; inside the block the caller gives it the weights."""
        ...

    def wake_if_asleep(self, pool: Pool) -> bool:
        """Wake the server if it sleeps; whether it did."""
        ...

    def objection(self, pool: Pool) -> str:
        """A note for the user on its sleep.  A server that would keep its memory is refused."""
        ...


class Dialect:
    """Requests to one kind of server."""

    kind: ClassVar[str]
    capabilities: ClassVar[Needs] = Needs.NOTHING
    """The evidence that its scores give."""
    no_scores: ClassVar[str] = ""
    """Why it scores no token ids; empty if it does.  Likewise below."""
    no_texts: ClassVar[str] = ""
    """Why it writes no token ids."""
    no_weights: ClassVar[str] = ""
    """Why it takes no weights."""
    weights: ClassVar[Weights | None] = None
    """How it takes weights."""
    program: ClassVar[tuple[str, ...]] = ()
    """The command that starts it, before the model's path; empty if unknown."""
    top_k_flag: ClassVar[str] = ""
    """The flag that allows a larger top-k, if it needs one."""
    context_flag: ClassVar[str] = "its context"
    """The flag that allows longer texts."""
    goes_on: ClassVar[Mapping[str, Any]] = {}
    """What a chat request needs beside the assistant's unfinished turn, for the server to go on with it."""
    raw_flag: ClassVar[str] = ""
    """The flag, if any, without which log-probabilities may depend on the request's temperature."""

    def score_job(
        self,
        name: str,
        model: str,
        sequences: Sequence[Sequence[int]],
        firsts: Sequence[int],
        top_k: int,
        temperature: float = 1.0,
    ) -> Job[list[Scored]]:
        """Log-probabilities of each sequence from its position in `firsts` on."""
        raise ServerRefused(self.no_scores)

    def text_job(self, name: str, model: str, request: Request, *, logprobs: bool = False) -> Job[Completion]:
        """Write a text.  Behaviour log-probabilities are () unless requested."""
        raise ServerRefused(self.no_texts)

    def own_text_job(self, name: str, model: str, request: Request, top_k: int) -> Job[tuple[Completion, Scored]]:
        """Write a text; returns it with the server's scores of each token when drawn."""
        raise ServerRefused(self.no_texts)

    def chat_job(self, name: str, model: str, messages: Sequence[Message], request: Request) -> Job[Reply]:
        """Answer a conversation, over OpenAI's route for every kind.  `request` has the sampling settings."""
        body = {
            "model": model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "max_tokens": request.max_new_tokens,
            "temperature": request.sampling.temperature,
            "top_p": request.sampling.top_p,
            "seed": request.seed & (2**31 - 1),
        }
        return Job(
            name=name,
            path="/v1/chat/completions",
            body=body,
            read=_read_reply,
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=text_limit(request),
        )

    def top_k_advice(self, top_k: int, otherwise: str) -> str:
        """Advice for a user whose server does not give the top-k."""
        return f"Start it with {self.top_k_flag} {top_k}, or {otherwise}." if self.top_k_flag else f"{otherwise}."


def score_limit(num_tokens: int, top_k: int) -> int:
    """Largest size of an answer in bytes: an entry takes about 70, with long token texts some more."""
    return 2**20 + 400 * num_tokens * (top_k + 2)


def text_limit(request: Request, top_k: int = 0) -> int:
    return 2**20 + 1000 * (len(request.token_ids) + request.max_new_tokens) + 100 * top_k * request.max_new_tokens


class _Message(TypedDict):
    content: Annotated[str, Field(min_length=1)]


class _Choice(TypedDict):
    message: _Message
    finish_reason: str


class _Answer(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


_ANSWER: TypeAdapter[Any] = TypeAdapter(_Answer)


def _read_reply(answer: bytes, request_id: str) -> Reply:
    choice = parsed(_ANSWER, answer)["choices"][0]
    if choice["finish_reason"] not in ("stop", "length"):
        raise ServerGarbled(f"a text ended for the reason {choice['finish_reason']!r}.")
    return Reply(content=choice["message"]["content"], ended=choice["finish_reason"] == "stop")
