"""A teacher behind inference servers: token ids go out, the written token's log-probability and the top-k come back.

One request scores one rollout.  What is answered is kept while the rest is asked again; what cannot be right is asked
again a few times and then ends the step.  Nothing is filled in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd.errors import (
    DataError,
    EvidenceError,
    ServerError,
    ServerGarbled,
    ServerRefused,
    ServerUnavailable,
    TeacherRefused,
    TeacherUnavailable,
)
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.servers.pool import Job, Pool
from tropd.servers.settings import ServerConfig
from tropd.servers.vllm import Scored, score_limit
from tropd.teachers.meeting import Canary, Card, card_of, dialect_of, meet
from tropd.teachers.teacher import TopKRows
from tropd.types import Rollout, TeacherScores

CAPABILITIES = {
    "vllm": Needs.SAMPLED | Needs.TOPK,
    "sglang": Needs.SAMPLED | Needs.TOPK,
    "openai": Needs.NOTHING,  # names tokens by their texts, which no token id can be told from
}
_MORE = (16, 64)
"""Further likely tokens to ask for where some of the top-k are not in the shared vocabulary."""
_NATS_OF_HALF_PRECISION = 0.1


@dataclass(frozen=True, kw_only=True)
class _Asked:
    rollout: Rollout
    top_k: int
    """To be given."""
    more: int = 0
    """To be asked for beyond that."""


class ServerTeacher:
    """Scores on one or more servers of the same model.  `canary` holds numbers already when a run is resumed."""

    def __init__(
        self,
        urls: Sequence[str],
        settings: ServerConfig,
        *,
        vocab_size: int,
        canary: Canary,
        num_rows: int | None = None,
        top_k: int = 0,
        name: str = "default",
    ) -> None:
        """`num_rows` is how many tokens the server's model knows, padding included, where that is known."""
        self.name, self.settings, self.vocab_size = name, settings, vocab_size
        self.num_rows = max(num_rows or vocab_size, vocab_size)
        self.capabilities = CAPABILITIES[settings.kind]
        self.noise = _NATS_OF_HALF_PRECISION
        self.pool = Pool(urls, settings)
        self.canary = canary
        self.card = Card(id=settings.model or "")
        with said_by(name):
            self.card = card_of(urls, settings)
            if self.capabilities:
                self.canary = meet(urls, settings, self.card.id, canary, min(top_k, self.vocab_size))

    @property
    def context(self) -> int | None:
        """The longest text it scores: one token less than it holds, because servers always write one."""
        return None if self.card.max_model_len is None else self.card.max_model_len - 1

    def score(
        self,
        rollouts: Sequence[Rollout],
        needs: Needs,
        *,
        top_k: int = 0,
        student_topk_ids_TJ: Sequence[Tensor] | None = None,
        top_k_rows: TopKRows | None = None,
    ) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order.  The top-k comes with the same request, so no row is left out."""
        self._check(rollouts, needs, top_k)
        width = min(top_k, self.vocab_size) if Needs.TOPK in needs else 0
        scores = {
            index: _scores([], [], [], width, Needs.TOPK in needs, self.name)
            for index, rollout in enumerate(rollouts)
            if not rollout.response_ids
        }
        open_ = {i: _Asked(rollout=r, top_k=width) for i, r in enumerate(rollouts) if i not in scores}
        for more in (*_MORE, None):
            with said_by(self.name):
                found = self.pool.run([self._job(asked) for asked in open_.values()])
            short = {}
            for (index, asked), scored in zip(open_.items(), found, strict=True):
                kept = self._within_vocabulary(scored, width)
                if kept is None:
                    short[index] = _Asked(rollout=asked.rollout, top_k=width, more=more or 0)
                else:
                    scores[index] = _scores(*kept, width, Needs.TOPK in needs, self.name)
            open_ = short
            if not open_:
                return [scores[index] for index in range(len(rollouts))]
        raise TeacherRefused(
            f"teacher {self.name}: {len(open_)} rollouts have tokens among the teacher's {width + _MORE[-1]} likeliest "
            f"of which fewer than {width} are in the shared vocabulary of {self.vocab_size}. Use a teacher with the "
            "student's vocabulary."
        )

    def close(self) -> None:
        self.pool.close()

    def _job(self, asked: _Asked) -> Job[Scored]:
        rollout, canary = asked.rollout, self.canary
        speech = dialect_of(self.settings)
        top_k = min(asked.top_k + asked.more, self.num_rows)
        sequences, first = [canary.ids, rollout.token_ids], len(rollout.prompt.token_ids)
        num_tokens = len(canary.ids) + len(rollout.token_ids) + len(sequences)

        def read(answer: bytes, request_id: str) -> Scored:
            known, scored = speech.read_scores(
                answer,
                model=self.card.id,
                sequences=sequences,
                firsts=[1, first],
                top_k=top_k,
                request_id=request_id,
            )
            canary.check(known.logprobs, self.settings.canary_nats)
            return scored

        return Job(
            name=f"rollout {rollout.id}",
            path=speech.SCORE,
            body=speech.score_body(self.card.id, sequences, top_k),
            named=speech.named,
            read=read,
            num_tokens=num_tokens,
            limit_bytes=score_limit(num_tokens, top_k),
        )

    def _within_vocabulary(
        self, scored: Scored, width: int
    ) -> tuple[list[float], list[list[int]], list[list[float]]] | None:
        """Without tokens that the student does not have; None where too few are left."""
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

    def _check(self, rollouts: Sequence[Rollout], needs: Needs, top_k: int) -> None:
        beyond = needs & OF_TEACHER & ~self.capabilities
        if beyond:
            raise EvidenceError(
                f"{beyond} was asked of teacher {self.name}, but a {self.settings.kind} server gives "
                f"{self.capabilities}. Use a teacher in this process."
            )
        if Needs.TOPK in needs and top_k < 1:
            raise EvidenceError(f"Needs.TOPK was asked of teacher {self.name} with top_k = {top_k}; give top_k >= 1.")
        for rollout in rollouts:
            if self.context is not None and len(rollout.token_ids) > self.context:
                raise DataError(
                    f"rollout {rollout.id} has {len(rollout.token_ids)} tokens, but the server of teacher {self.name} "
                    f"scores at most {self.context}: it holds {self.context + 1} (--max-model-len) and writes one."
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
    found: dict[str, Any] = {}
    if wants_top_k:
        shape = (len(logprobs), width)
        found["topk_ids_TK"] = torch.tensor(topk_ids_TK, dtype=torch.int64).reshape(shape)
        found["topk_logprobs_TK"] = torch.tensor(topk_logprobs_TK, dtype=torch.float32).reshape(shape)
    return TeacherScores(logprobs_T=torch.tensor(logprobs, dtype=torch.float32), teacher=name, **found)


class said_by:
    """What servers say, said by the teacher behind them."""

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
