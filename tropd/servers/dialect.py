"""What every kind of server is asked for, as jobs of a pool; each kind says how, and what it cannot do.

A dialect of your own is a subclass: it builds the jobs, names what its scores can be evidence of, and has one sentence
for everything that it cannot do.  Nothing else in tropd asks which kind a server is.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """What a chat endpoint wrote."""

    content: str
    ended: bool
    """By itself, not at the limit."""


class Weights(Protocol):
    """How a kind of server is given other weights, and how it sleeps in between.  Each pool has one server."""

    sleep_advice: str
    """How to start a server that can sleep."""

    def give(self, pool: Pool, folder: Path) -> None:
        """Have the server read weights from a folder that it sees as well."""
        ...

    def forget(self, pool: Pool) -> None:
        """What was computed with the old weights must not be continued with the new ones."""
        ...

    def give_adapter(self, pool: Pool, name: str, folder: Path) -> None:
        """Have the server serve an adapter under a name, whatever it served there before."""
        ...

    def drop_adapter(self, pool: Pool, name: str) -> None: ...

    def advice(self, adapter: bool) -> str:
        """How to start a server that takes weights."""
        ...

    def serving(self, rank: int | None) -> tuple[list[str], dict[str, str]]:
        """Flags and variables that start it so; `rank` is the adapters'."""
        ...

    def sleep(self, pool: Pool, adapter: bool) -> None:
        """Have the server give its GPU memory back.  It loses its weights; under an adapter it keeps the base's."""
        ...

    def waking(self, pool: Pool, adapter: bool) -> AbstractContextManager[None]:
        """The block gives the weights to the server that slept."""
        ...

    def wake_if_asleep(self, pool: Pool) -> bool:
        """Whether somebody had left it asleep."""
        ...

    def objection(self, pool: Pool) -> str:
        """What a user should know about its sleep.  A server that would keep its memory is refused."""
        ...


class Dialect:
    """How one kind of server is spoken to."""

    kind: ClassVar[str]
    capabilities: ClassVar[Needs] = Needs.NOTHING
    """The evidence that its scores can be."""
    no_scores: ClassVar[str] = ""
    """Why it scores no token ids; empty where it does.  Likewise below."""
    no_texts: ClassVar[str] = ""
    """Why it writes no token ids."""
    no_weights: ClassVar[str] = ""
    """Why it takes no weights."""
    weights: ClassVar[Weights | None] = None
    """How it takes weights."""
    program: ClassVar[tuple[str, ...]] = ()
    """What starts it, before the model's path; empty where that is not known."""
    top_k_flag: ClassVar[str] = ""
    """The flag that allows a larger top-k, where it needs one."""
    context_flag: ClassVar[str] = "its context"
    """The flag that allows longer texts."""
    raw_flag: ClassVar[str] = ""
    """The flag without which log-probabilities may depend on the temperature of the request, where that can be."""

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
        """A text.  Behaviour log-probabilities are () unless they are asked for."""
        raise ServerRefused(self.no_texts)

    def own_text_job(self, name: str, model: str, request: Request, top_k: int) -> Job[tuple[Completion, Scored]]:
        """A text, and what the server said of each token when it drew it."""
        raise ServerRefused(self.no_texts)

    def chat_job(self, name: str, model: str, messages: Sequence[Message], request: Request) -> Job[Reply]:
        """The answer to a conversation, which every kind gives over OpenAI's route.  `request` says how it is drawn."""
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
        """What to do about a top-k that does not come."""
        return f"Start it with {self.top_k_flag} {top_k}, or {otherwise}." if self.top_k_flag else f"{otherwise}."


def score_limit(num_tokens: int, top_k: int) -> int:
    """Bytes that an answer may have: an entry takes about 70 of them, longer token texts some more."""
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
