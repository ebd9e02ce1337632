"""A teacher on inference servers: token ids go out, log-probabilities of written tokens and top-k come back.

One request scores one rollout.  Answers are kept while failed requests are repeated.  A wrong answer is requested again
a few times, and then ends the step.  Nothing is filled in.  Servers are examined when they are met, and watched from
then on (`tropd.teachers.watch`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from tropd.config.models import NATS_OF_HALF_PRECISION, ServerConfig
from tropd.errors import (
    DataError,
    ServerError,
    ServerGarbled,
    ServerRefused,
    ServerUnavailable,
    TeacherRefused,
    TeacherUnavailable,
)
from tropd.objective.evidence import Needs
from tropd.servers.answers import Scored
from tropd.servers.cards import Card
from tropd.servers.dialects import dialect_of
from tropd.servers.pool import Job, Pool
from tropd.teachers.audit import Known
from tropd.teachers.meeting import Canary, card_of, meet
from tropd.teachers.questions import Questions, text_of
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.teachers.watch import Watch
from tropd.types import Rollout, TeacherScores

_MORE = (16, 64)
"""Extra likely tokens to request, in case some of the top-k are not in the shared vocabulary."""
_UNUSED = 0.01
"""Probability that a model may give to rows of its head that are no tokens."""


class ServerTeacher(Teacher):
    """Scores on one or more servers of the same model.  `canary` already has its numbers when a run is resumed."""

    elsewhere = True
    noise = NATS_OF_HALF_PRECISION

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerConfig,
        *,
        vocab_size: int,
        canary: Canary,
        num_rows: int | None = None,
        num_known: int | None = None,
        top_k: int = 0,
        name: str = "default",
        dtype: str = "auto",
        text: Sequence[int] = (),
        reference: Known | None = None,
    ) -> None:
        """`num_rows` counts the rows of the served model's head, `num_known` those of them that are tokens, if known.
        `dtype` is the precision of the servers, `text` has many scripts, and `reference` scores texts with a forward
        pass in this process."""
        self.name, self.vocab_size = name, vocab_size
        self.settings = replace(settings, canary_nats=settings.nats_for(dtype))
        self.num_rows = max(num_rows or vocab_size, vocab_size)
        self.num_known = max(num_known or self.num_rows, vocab_size)
        self.dialect = dialect_of(settings)
        self.capabilities = self.dialect.capabilities
        self.pool = Pool(urls, self.settings)
        self.canary = canary
        self.card = Card(id=settings.model or "")
        self.watch: Watch | None = None
        self.notes: list[str] = []
        with said_by(name):
            self.card = card_of(urls, self.settings)
            if self.card.max_model_len is not None:
                self.context = self.card.max_model_len - 1  # servers always write one token
            if self.capabilities:
                width = min(top_k, self.vocab_size)
                self.canary = meet(urls, self.settings, self.card.id, canary, width)
                questions = Questions(
                    urls=tuple(dict.fromkeys(client.url for client in self.pool.clients)),
                    settings=self.settings,
                    card=self.card,
                    top_k=width,
                    vocab_size=vocab_size,
                    text=text_of(text or canary.ids, vocab_size, self.context),
                )
                self.watch = Watch(questions, self._ask_again, reference)
                self.notes = self.watch.notes

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """Scores every row: the top-k comes with the same request."""
        request.check(self)
        rollouts, wants_top_k = request.rollouts, Needs.TOPK in request.needs
        self._check(rollouts)
        width = min(request.top_k, self.vocab_size) if wants_top_k else 0
        scores = {
            index: _scores([], [], [], width, wants_top_k, self.name)
            for index, rollout in enumerate(rollouts)
            if not rollout.response_ids
        }
        open_ = {index: rollout for index, rollout in enumerate(rollouts) if index not in scores}
        batch: list[tuple[Rollout, Scored]] = []
        answers, wider = dict(self.pool.tally.by_server), width
        for more in (*_MORE, None):
            with said_by(self.name):
                jobs = [
                    self._job(f"rollout {r.id}", r.token_ids, len(r.prompt.token_ids), wider) for r in open_.values()
                ]
                answered = self.pool.run(jobs)
            batch = batch or list(zip(open_.values(), answered, strict=True))
            short = {}
            for (index, rollout), scored in zip(open_.items(), answered, strict=True):
                kept = self._within_vocabulary(scored, width)
                if kept is None:
                    short[index] = rollout
                else:
                    scores[index] = _scores(*kept, width, wants_top_k, self.name)
            open_, wider = short, width + (more or 0)
            if not open_:
                self._check_servers(answers, batch, width)
                return [scores[index] for index in range(len(rollouts))]
        raise TeacherRefused(
            f"teacher {self.name}: {len(open_)} rollouts have tokens among the teacher's {width + _MORE[-1]} likeliest "
            f"of which fewer than {width} are in the shared vocabulary of {self.vocab_size}. Use a teacher with the "
            "student's vocabulary."
        )

    def close(self) -> None:
        self.pool.close()

    def _job(
        self, name: str, token_ids: Sequence[int], first: int, top_k: int, before_canary: bool = False
    ) -> Job[Scored]:
        canary, order = self.canary, -1 if before_canary else 1
        sequences, firsts = [canary.ids, token_ids][::order], [1, first][::order]

        def check(both: list[Scored]) -> Scored:
            known, scored = both[::order]
            canary.check(known.logprobs, self.settings.nats_for())
            self._check_unused(scored)
            return scored

        top_k = min(top_k, self.num_rows)
        return self.dialect.score_job(name, self.card.id, sequences, firsts, top_k).then(check)

    def _check_servers(self, answers: Mapping[str, int], batch: Sequence[tuple[Rollout, Scored]], width: int) -> None:
        """`answers` counts each server's answers before the batch."""
        if self.watch is None:
            return
        with said_by(self.name):
            urls = [url for url, number in self.pool.tally.by_server.items() if number > answers.get(url, 0)]
            self.watch.check(urls, self.pool.returned, batch, width)

    def _ask_again(
        self, urls: Sequence[str], texts: Sequence[tuple[int, ...]], first: int, top_k: int, before_canary: bool
    ) -> list[Scored]:
        """Send requests like those for rollouts; `urls` name servers, by default any free one."""
        pool = Pool(urls, self.watch.settings) if urls and self.watch is not None else self.pool
        try:
            return pool.run([self._job("a known text", text, first, top_k, before_canary) for text in texts])
        finally:
            if pool is not self.pool:
                pool.close()

    def _check_unused(self, scored: Scored) -> None:
        for ids, logprobs in zip(scored.topk_ids_TK, scored.topk_logprobs_TK, strict=True):
            unused = math.fsum(math.exp(x) for i, x in zip(ids, logprobs, strict=True) if i >= self.num_known)
            if unused > _UNUSED:
                raise ServerGarbled(
                    f"{unused:.1%} of a distribution lie on ids from {self.num_known} on, which stand for no token of "
                    "teacher.path: the rows that pad its head have probability there."
                )

    def _within_vocabulary(
        self, scored: Scored, width: int
    ) -> tuple[list[float], list[list[int]], list[list[float]]] | None:
        """The row without tokens that the student lacks; None if too few are left."""
        ids_TK, logprobs_TK = scored.topk_ids_TK, scored.topk_logprobs_TK
        if all(index < self.vocab_size for row in ids_TK for index in row):
            return scored.logprobs, [row[:width] for row in ids_TK], [row[:width] for row in logprobs_TK]
        kept = [
            [(i, x) for i, x in zip(ids, logprobs, strict=True) if i < self.vocab_size][:width]
            for ids, logprobs in zip(ids_TK, logprobs_TK, strict=True)
        ]
        if min(map(len, kept)) < width:
            return None
        return scored.logprobs, [[i for i, _ in row] for row in kept], [[x for _, x in row] for row in kept]

    def _check(self, rollouts: Sequence[Rollout]) -> None:
        for rollout in rollouts:
            if self.context is not None and len(rollout.token_ids) > self.context:
                raise DataError(
                    f"rollout {rollout.id} has {len(rollout.token_ids)} tokens, but the server of teacher {self.name} "
                    f"scores at most {self.context}: it holds {self.context + 1} ({self.dialect.context_flag}) and "
                    "writes one."
                )
            if rollout.response_ids and not rollout.prompt.token_ids:
                raise DataError(f"rollout {rollout.id} has no prompt, so nothing predicts its first token.")
            if max(rollout.token_ids, default=0) >= self.num_rows:
                raise DataError(
                    f"rollout {rollout.id} holds token id {max(rollout.token_ids)}, but teacher {self.name} knows "
                    f"{self.num_rows}. Was it written with another tokenizer?"
                )


def _scores(
    logprobs: list[float],
    topk_ids_TK: list[list[int]],
    topk_logprobs_TK: list[list[float]],
    width: int,
    wants_top_k: bool,
    name: str,
) -> TeacherScores:
    ids_TK = top_TK = None
    if wants_top_k:
        shape = (len(logprobs), width)
        ids_TK = torch.tensor(topk_ids_TK, dtype=torch.int64).reshape(shape)
        top_TK = torch.tensor(topk_logprobs_TK, dtype=torch.float32).reshape(shape)
    logprobs_T = torch.tensor(logprobs, dtype=torch.float32)
    return TeacherScores(logprobs_T=logprobs_T, topk_ids_TK=ids_TK, topk_logprobs_TK=top_TK, teacher=name)


class said_by:
    """Turn errors of servers into errors of the teacher."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ServerUnavailable):
            raise TeacherUnavailable(f"teacher {self.name}: {error}") from error
        if isinstance(error, ServerGarbled | ServerRefused):
            raise TeacherRefused(f"teacher {self.name}: {error}") from error
        assert not isinstance(error, ServerError), "every error of a server has a teacher's"
