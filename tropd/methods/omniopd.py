"""OmniOPD: a teacher that only writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, NotNegative
from tropd.briefings.reader import Reader
from tropd.methods.base import Method
from tropd.objective.chunks import Audited, ChunkSupport, Similarity, WeighedLikelihood
from tropd.objective.losses import ForwardKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Term


@dataclass(frozen=True, kw_only=True)
class OmniOPD(Method):
    r"""The teacher writes N continuations in place of M chunks of each response,
    at peaks of the student's entropy.  How much they resemble a chunk says how
    likely its tokens should be; all other tokens stay near the start.

        - (k + alpha p) / (N + alpha) log pi_S(y_t)       in an audited chunk
        beta KL(pi_start || pi_S)                         at all other tokens
        k = sum_n similarity(chunk, continuation n)
        p = exp(mean log pi_S over the chunk)
    """

    name: Literal["omniopd"] = "omniopd"
    chunks: Count = 10
    """Chunks of each response, M; fewer where no more fit (reproduction: 10). At least 1."""
    chunk_tokens: Count = 50
    """Tokens of a chunk and of a continuation, C (reproduction: 50). At least 1."""
    continuations: Count = 10
    """What the teacher writes in place of each chunk, N (reproduction: 10). At least 1."""
    similarity: Similarity = "edit"
    """How two texts are compared: edited characters, or words in common, ROUGE-1 (reproduction: either)."""
    alpha: NotNegative = 1.0
    """How many continuations the student's own confidence is worth (reproduction: 1). At least 0."""
    beta: NotNegative = 0.1
    """Weight of the anchor to the start (reproduction: 0.1; without it 69.08 fell to 8.28). At least 0."""

    paper = "2606.01476"
    idea = "what teaches"
    summary = "likelihood of chunks by how much a teacher that only writes agrees, anchored to the start"
    readings = (
        "No code by the authors was found: the definition and the defaults are those of a reproduction.",
        "A chunk begins at a peak of the entropy: the highest first, then the next from which a chunk has room. A "
        "response that is shorter than a chunk is one chunk. [inferred]",
        "Both sums are divided by all trained tokens of the batch. [inferred]",
        "A continuation is cut to as many of the student's tokens as its chunk has, and spaces around both texts do "
        "not count. [inferred]",
        "A chunk of which a continuation is missing is not audited: its tokens fall to the anchor. [inferred]",
    )
    zero_at_teacher = False

    @property
    def objective(self) -> Objective:
        support = ChunkSupport(
            chunks=self.chunks,
            tokens=self.chunk_tokens,
            continuations=self.continuations,
            similarity=self.similarity,
            alpha=self.alpha,
        )
        return Objective(
            Term("audited", STUDENT & Audited(), WeighedLikelihood(support)),
            Term("anchor", STUDENT & ~Audited(), ForwardKL(reader="start"), weight=self.beta),
        )

    @property
    def readers(self) -> Mapping[str, Reader]:
        return {"start": Reader(model="start")}
