"""Chunks of a response, for a teacher that only writes (OmniOPD, arXiv 2606.01476).

Where the student was least sure, the teacher writes N continuations in place of a chunk of the response.  How much they
resemble the chunk, k in [0, N], is all that the teacher says:

    teacher_chunks_N    n > 0 in the n-th chunk; -n where the teacher did not write all continuations; 0 elsewhere
    teacher_support_N   k in an audited chunk, else 0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tropd.base.ranges import Count, NotNegative, Ranged
from tropd.errors import EvidenceError
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.selectors import as_weight
from tropd.objective.terms import Piece, Reward, Selector, TokenLoss, check_piece
from tropd.types import Author

Similarity = Literal["edit", "rouge1"]


@dataclass(frozen=True, kw_only=True)
class Audit(Ranged):
    """Which chunks of a response are compared with what the teacher writes, and how."""

    section = "method"

    chunks: Count = 10
    tokens: Count = 50
    continuations: Count = 10
    similarity: Similarity = "edit"


def audits(piece: Piece, around: str) -> set[tuple[str, Audit]]:
    """(reader, audit) of everything in a piece that asks for chunks; `around` is the reader of the piece around it."""
    reader = piece.reader or around
    own = {(reader, audit)} if (audit := getattr(piece, "audit", None)) else set()
    return own.union(*(audits(part, reader) for part in piece.parts()))


def peaks(entropies: Sequence[float], authors: Sequence[int], audit: Audit) -> list[range]:
    """Chunks of a response in their order: each begins at the highest entropy from which a chunk of the student's
    tokens has room that overlaps no other.  A response that is shorter than a chunk is one chunk."""
    run, longest = 0, 0
    runs = []  # how many of the student's tokens in a row end here
    for author in authors:
        run = run + 1 if author == Author.STUDENT else 0
        runs.append(run)
        longest = max(longest, run)
    size = min(audit.tokens, longest)
    if size == 0:
        return []
    starts = [end - size + 1 for end, run in enumerate(runs) if run >= size]
    chosen: list[int] = []
    for start in sorted(starts, key=lambda start: (-entropies[start], start)):
        if len(chosen) == audit.chunks:
            break
        if all(abs(start - other) >= size for other in chosen):
            chosen.append(start)
    return [range(start, start + size) for start in sorted(chosen)]


def chunks_of(tokens: Tokens, audit: Audit) -> list[list[range]]:
    """The chunks of each response."""
    lengths = torch.bincount(tokens.sequences_N, minlength=len(tokens.keys_S)).tolist()
    entropies_T, authors_T = tokens.student_entropy_N.cpu().split(lengths), tokens.authors_N.cpu().split(lengths)
    return [peaks(e.tolist(), a.tolist(), audit) for e, a in zip(entropies_T, authors_T, strict=True)]


def asked_chunks(audit: Audit | None, tokens: Tokens) -> dict[str, Any]:
    """What a request for chunks holds (`ScoreRequest`); nothing without an audit."""
    return {} if audit is None else {"audit": audit, "chunks": chunks_of(tokens, audit)}


@dataclass(frozen=True)
class Audited(Selector):
    """1 in the chunks that the teacher's continuations were compared with.

    >>> tokens = some_tokens(teacher_chunks_N=[0.0, 1.0, 1.0, -2.0])  # the last one was never answered
    >>> Audited()(tokens, Context())
    tensor([0., 1., 1., 0.])
    """

    own_needs = Needs.CHUNKS

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return as_weight(tokens.teacher_chunks_N > 0, tokens.teacher_chunks_N)


@dataclass(frozen=True)
class ChunkSupport(Reward):
    """+ (k + alpha p) / (N + alpha), p = exp(mean log pi_S over the chunk) as of planning: in [0, 1], no gradient.

    The teacher's support of a chunk, drawn towards the student's own confidence: alpha is worth as many continuations.

    >>> tokens = some_tokens(
    ...     student_logprobs_N=[-1.0, -3.0, -2.0],
    ...     teacher_chunks_N=[1.0, 1.0, 0.0],
    ...     teacher_support_N=[3.0, 3.0, 0.0],
    ... )
    >>> ChunkSupport(continuations=4)(torch.zeros(3), tokens, Context())[:2]  # (3 + e^-2) / 5
    tensor([0.6271, 0.6271])
    """

    chunks: Count = 10
    tokens: Count = 50
    continuations: Count = 10
    similarity: Similarity = "edit"
    alpha: NotNegative = 1.0

    own_needs = Needs.CHUNKS
    own_reach = Reach.SEQUENCE

    @property
    def audit(self) -> Audit:
        return Audit(
            chunks=self.chunks, tokens=self.tokens, continuations=self.continuations, similarity=self.similarity
        )

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        logprobs_N = at_least_float32(tokens.student_logprobs_N)
        chunk_N, support_N = tokens.teacher_chunks_N.long(), tokens.teacher_support_N.to(logprobs_N)
        self._check(chunk_N, support_N)
        group_N = tokens.sequences_N * (self.chunks + 1) + chunk_N.clamp_min(0)
        size_N = torch.bincount(group_N)[group_N]
        sums = logprobs_N.new_zeros(int(group_N.max()) + 1).index_add_(0, group_N, logprobs_N)
        confidence_N = (sums[group_N] / size_N).exp()
        return reward_N + (support_N + self.alpha * confidence_N) / (self.continuations + self.alpha)

    def _check(self, chunk_N: Tensor, support_N: Tensor) -> None:
        """A teacher may be anybody's."""
        if bool((chunk_N > self.chunks).any()):
            raise EvidenceError(
                f"`teacher_chunks_N` holds {int(chunk_N.max())}, but {self.chunks} chunks were asked for."
            )
        if not bool(((support_N >= 0) & (support_N <= self.continuations)).all()):
            raise EvidenceError(
                f"`teacher_support_N` holds numbers from {float(support_N.min()):g} to {float(support_N.max()):g}, but "
                f"{self.continuations} continuations support a chunk with 0 to {self.continuations}."
            )


@dataclass(frozen=True)
class WeighedLikelihood(TokenLoss):
    """-a log pi_S(x) with a reward a >= 0 that carries no gradient.

    >>> view = StudentView(logprobs_N=torch.tensor([-1.0, -2.0]))
    >>> WeighedLikelihood(ChunkSupport())(some_tokens(token_ids_N=[5, 6]), view, torch.tensor([0.5, 1.0]))
    tensor([0.5000, 2.0000])
    """

    reward: Reward

    def __post_init__(self) -> None:
        super().__post_init__()
        check_piece(self.reward, Reward, "the weight of a likelihood")

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        if reward_N is None:
            raise EvidenceError("a weighed likelihood was asked for without the rewards of its plan.")
        return -reward_N * student.logprobs_N
