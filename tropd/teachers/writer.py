"""The teacher as a writer, behind a server: what prefixes are made of.  Texts need no log-probabilities.

`ServerWriter` sends token ids and gets token ids.  `ChatWriter` sends messages to any chat endpoint and gets text,
which is tokenised again: the tokens may be cut otherwise than the teacher wrote them, and its reasoning may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from tropd.errors import ServerGarbled, TeacherError, TeacherRefused
from tropd.servers.pool import Job, Pool
from tropd.servers.vllm import text_limit
from tropd.teachers.meeting import dialect_of
from tropd.teachers.server import said_by
from tropd.types import Completion, Finish, Message, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServerWriter:
    """An engine that continues token ids on the teacher's servers."""

    def __init__(self, pool: Pool, model: str, vocab_size: int, name: str = "default") -> None:
        """`vocab_size` is how many tokens the student shares."""
        self.pool, self.model, self.vocab_size, self.name = pool, model, vocab_size, name

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        with said_by(self.name):
            texts = self.pool.run([self._job(number, request) for number, request in enumerate(requests)])
        for text in texts:
            if max(text.token_ids, default=0) >= self.vocab_size:
                raise TeacherRefused(
                    f"teacher {self.name} wrote token {max(text.token_ids)}, but student and teacher share "
                    f"{self.vocab_size}. Use a teacher with the student's vocabulary, or a method without "
                    "the teacher's texts."
                )
        return texts

    def sync(self, version: int) -> None:
        """A teacher does not change."""

    def close(self) -> None:
        self.pool.close()

    def _job(self, number: int, request: Request) -> Job[Completion]:
        speech = dialect_of(self.pool.settings)
        return Job(
            name=f"text {number}",
            path=speech.TEXT,
            body=speech.text_body(self.model, request),
            named=speech.named,
            read=lambda answer, request_id: speech.read_text(
                answer, model=self.model, request=request, request_id=request_id
            ),
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=text_limit(request),
        )


class _Message(TypedDict):
    content: Annotated[str, Field(min_length=1)]


class _Choice(TypedDict):
    message: _Message
    finish_reason: str


class _Answer(TypedDict):
    __pydantic_config__ = ConfigDict(strict=True, extra="ignore")  # type: ignore[misc]
    choices: Annotated[list[_Choice], Field(min_length=1, max_length=1)]


_ANSWER = TypeAdapter(_Answer)


class ChatWriter(ServerWriter):
    """An engine that asks a chat endpoint.  `messages` are the conversations behind the prompts' token ids; a prompt
    without any is sent as one message of the user."""

    def __init__(
        self,
        pool: Pool,
        model: str,
        vocab_size: int,
        tokenizer: PreTrainedTokenizerBase,
        messages: Mapping[tuple[int, ...], tuple[Message, ...]],
        name: str = "default",
    ) -> None:
        super().__init__(pool, model, vocab_size, name)
        self.tokenizer, self.messages = tokenizer, messages

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        for request in requests:
            if request.token_ids not in self.messages:
                raise TeacherError("a chat endpoint answers prompts of the data set alone; this is none of them.")
        return super().generate(requests)

    def _job(self, number: int, request: Request) -> Job[Completion]:
        known = self.messages[request.token_ids]
        said = known or (Message(role="user", content=str(self.tokenizer.decode(list(request.token_ids)))),)
        return Job(
            name=f"text {number}",
            path="/v1/chat/completions",
            body={
                "model": self.model,
                "messages": [{"role": message.role, "content": message.content} for message in said],
                "max_tokens": request.max_new_tokens,
                "temperature": request.sampling.temperature,
                "top_p": request.sampling.top_p,
                "seed": request.seed & (2**31 - 1),
            },
            read=lambda answer, _: self._read(answer, request),
            num_tokens=len(request.token_ids) + request.max_new_tokens,
            limit_bytes=text_limit(request),
        )

    def _read(self, answer: bytes, request: Request) -> Completion:
        try:
            choice = _ANSWER.validate_json(answer)["choices"][0]
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ServerGarbled(f"no chat message: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from None
        if choice["finish_reason"] not in ("stop", "length"):
            raise ServerGarbled(f"a text ended for the reason {choice['finish_reason']!r}.")
        ids = [*self.tokenizer.encode(choice["message"]["content"], add_special_tokens=False)]
        if choice["finish_reason"] == "stop":
            ids += request.stop_ids[:1]
        end = next((place for place, token in enumerate(ids) if token in request.stop_ids), len(ids))
        whole = end < min(len(ids), request.max_new_tokens)
        ids = ids[: end + 1][: request.max_new_tokens]
        return Completion(
            token_ids=tuple(ids),
            behavior_logprobs=(),
            model_logprobs=(),
            finish=Finish.STOP if whole else Finish.LENGTH,
        )
