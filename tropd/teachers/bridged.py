"""A teacher with another tokenizer: it reads the text of what the student wrote, and its log-probabilities come back.

    the student's ids -> text -> the teacher's ids -> scores -> chunks -> a log-probability for each of the student's

What crosses is the evidence of written tokens.  A token that no chunk brings back is not read: it counts nowhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from tropd.bridge.chunks import credited
from tropd.bridge.translation import Bridge, Translation
from tropd.config.bridge import BridgeConfig
from tropd.data.chat import stop_ids
from tropd.objective.evidence import Needs
from tropd.rollout.engine import Engine
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.types import Author, Completion, Finish, Request, Rollout, TeacherScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropd.distributed.ranks import Ranks


class Bridged(Teacher):
    """Wraps a teacher that reads its own tokens.  Prompts come in the teacher's tokens (`Prompt.told`), responses in
    the student's."""

    capabilities = Needs.SAMPLED

    def __init__(self, inner: Teacher, tokenizer: PreTrainedTokenizerBase, size: int, config: BridgeConfig) -> None:
        """`tokenizer` and `size` are the teacher's."""
        self.inner, self.tokenizer, self.size, self.config = inner, tokenizer, size, config
        self.name, self.noise, self.elsewhere = inner.name, inner.noise, inner.elsewhere
        self.bridge: Bridge | None = None
        self.sharded = False

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        self.bridge = Bridge(student=tokenizer, teacher=self.tokenizer, config=self.config)
        assert self.bridge.special is not None  # a wrong map is refused before anything is written
        self.inner.prepare(self.tokenizer, self.size, device)

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        request.check(self)
        texts = [self._translated(rollout) for rollout in request.rollouts]
        sent = [i for i, text in enumerate(texts) if self._fits(request.rollouts[i], text)]
        rollouts = [_in_tokens_of(request.rollouts[i], texts[i]) for i in sent]
        if self.sharded and not rollouts:  # all processes ask a sharded teacher together
            self.inner.score(ScoreRequest([_anything(request.rollouts[0])]))
        scores = self.inner.score(ScoreRequest(rollouts)) if rollouts else []
        found = dict(zip(sent, scores, strict=True))
        return [self._back(rollout, texts[i], found.get(i)) for i, rollout in enumerate(request.rollouts)]

    def _translated(self, rollout: Rollout) -> Translation:
        assert self.bridge is not None, "prepared before the first request"
        ended = rollout.finish == Finish.STOP
        return self.bridge.translate(rollout.response_ids, rollout.prompt.token_ids, ended)

    def _fits(self, rollout: Rollout, text: Translation) -> bool:
        length = len(rollout.prompt.token_ids) + len(text.token_ids)
        return bool(text.read) and (self.inner.context is None or length <= self.inner.context)

    def _back(self, rollout: Rollout, text: Translation, score: TeacherScores | None) -> TeacherScores:
        number = len(rollout.response_ids)
        if score is None:
            nothing = torch.zeros(number)
            return TeacherScores(logprobs_T=nothing, read_T=nothing.bool(), teacher=self.name)
        start = len(rollout.prompt.token_ids)
        student_T = torch.tensor((rollout.model_logprobs or rollout.behavior_logprobs)[start:])
        theirs_T = score.logprobs_T.float().cpu()
        authors = rollout.authors[start:]  # a piece that two wrote says of neither what its own tokens did
        read = [chunk for chunk in text.read if len(set(authors[slice(*chunk.student)])) == 1]
        logprobs_T, read_T = credited(read, theirs_T, student_T, number, self.config.credit, self.config.most_nats)
        return TeacherScores(logprobs_T=logprobs_T, read_T=read_T, teacher=score.teacher)

    def shard(self, world: Ranks) -> bool:
        self.sharded = self.inner.shard(world)
        return self.sharded

    def more_passes(self, number: int) -> int:
        return self.inner.more_passes(number)

    def whole(self) -> AbstractContextManager[None]:
        return self.inner.whole()

    def close(self) -> None:
        self.inner.close()


def _in_tokens_of(rollout: Rollout, text: Translation) -> Rollout:
    """The same response in the teacher's tokens."""
    prompt, number = rollout.prompt.token_ids, len(text.token_ids)
    return replace(
        rollout,
        token_ids=prompt + text.token_ids,
        authors=(Author.CONTEXT,) * len(prompt) + (Author.STUDENT,) * number,
        behavior_logprobs=(0.0,) * (len(prompt) + number),
        model_logprobs=(),
    )


def _anything(rollout: Rollout) -> Rollout:
    """A shortest text."""
    first = rollout.prompt.token_ids[:1]
    short = replace(rollout, prompt=replace(rollout.prompt, token_ids=first), token_ids=first)
    return _in_tokens_of(short, Translation(token_ids=first, chunks=(), read=()))


class BridgedWriter(Engine):
    """The teacher writes in its own tokens, and the text comes back in the student's."""

    def __init__(self, inner: Engine, bridge: Bridge) -> None:
        self.inner, self.bridge, self.context = inner, bridge, None
        self.ends = stop_ids(bridge.teacher)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        texts = self.inner.generate([replace(request, stop_ids=self.ends) for request in requests])
        return [self._back(request, text) for request, text in zip(requests, texts, strict=True)]

    def _back(self, request: Request, text: Completion) -> Completion:
        ids = self.bridge.back(text.token_ids, text.finish == Finish.STOP)
        ends = next((n + 1 for n, index in enumerate(ids) if index in request.stop_ids), None)
        cut = ids[: min(ends or len(ids), request.max_new_tokens)]
        silent = (0.0,) * len(cut)
        finish = Finish.STOP if len(cut) == ends else Finish.LENGTH
        return Completion(token_ids=cut, behavior_logprobs=silent, model_logprobs=silent, finish=finish)

    def close(self) -> None:
        self.inner.close()
