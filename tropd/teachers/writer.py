"""The teacher as a writer of prefixes, on a server.  Texts need no log-probabilities.

`ServerWriter` sends token ids and gets token ids.  `ChatWriter` sends messages to any chat endpoint and gets text,
which is tokenised again: tokens may be cut differently than the teacher wrote them, and its reasoning may be missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tropd.errors import TeacherError, TeacherRefused
from tropd.rollout.engine import Engine
from tropd.servers.dialect import Reply
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.teachers.server import said_by
from tropd.types import Completion, Finish, Message, Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ServerWriter(Engine):
    """An engine that continues token ids on the teacher's servers."""

    def __init__(self, pool: Pool, model: str, vocab_size: int, name: str = "default") -> None:
        """`vocab_size` is the number of tokens that student and teacher share."""
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

    def close(self) -> None:
        self.pool.close()

    def _job(self, number: int, request: Request) -> Job[Completion]:
        return dialect_of(self.pool.settings).text_job(f"text {number}", self.model, request)


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
        job = dialect_of(self.pool.settings).chat_job(f"text {number}", self.model, said, request)
        return job.then(lambda reply: self._read(reply, request))

    def _read(self, reply: Reply, request: Request) -> Completion:
        ids = [*self.tokenizer.encode(reply.content, add_special_tokens=False)]
        if reply.ended:
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
