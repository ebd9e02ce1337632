"""What the divergences share: which tokens of the vocabulary they sum over, and what each may add to the sum."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tropd.base.ranges import Count, Positive, Whole
from tropd.errors import ConfigError
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.support import NOTHING, Outside, Support, add_bucket, at_ids, on_support
from tropd.objective.targets import Target
from tropd.objective.terms import TokenLoss


@dataclass(frozen=True)
class DivergenceLoss(TokenLoss):
    """A sum over a support, differentiated through the student's probabilities."""

    support: Support = "full"
    top_k: Count = 64
    outside: Outside = "ignore"
    target: Target | None = None
    """A transformation of the teacher's distribution (full support only)."""
    entry_clip: Positive | None = None
    """The most that one entry of the vocabulary adds to the sum, in nats; an entry above it has no gradient."""
    ids: tuple[Whole, ...] = ()
    """Sum over these tokens only (full support only).  Both distributions are made whole and read there, so it costs
    as much as the whole sum."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outside == "renormalise" and (len(self.ids) if self.support == "full" else self.top_k) == 1:
            raise ConfigError(
                "renormalising over one token makes both probabilities 1 and the loss identically 0. "
                "Use top_k >= 2, or outside='bucket' or 'generalised'."
            )
        if self.target is not None and self.support != "full":
            raise ConfigError("a transformed target needs the teacher's whole distribution: use support='full'.")
        if self.ids and self.support != "full":
            raise ConfigError(f"a sum over `ids` was asked for on support={self.support!r}: use support='full'.")
        if len(set(self.ids)) < len(self.ids):
            raise ConfigError("`ids` name a token more than once, which would count it twice. Give each id once.")

    def named_ids(self) -> Iterator[int]:
        yield from self.ids
        yield from super().named_ids()

    @property
    def own_needs(self) -> Needs:  # type: ignore[override]
        top, own = Needs.TOPK, Needs.STUDENT_TOPK
        return {
            "full": Needs.FULL,
            "teacher_top_k": top,
            "student_top_k": own,
            "union": top | own,
            "intersection": top | own,
            "difference": top | own,
        }[self.support]

    @property
    def teacher_top_k(self) -> int:
        return self.top_k if self.own_needs & Needs.TOPK else 0

    @property
    def student_top_k(self) -> int:
        return self.top_k if self.own_needs & Needs.STUDENT_TOPK else 0

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        log_t, log_s = on_support(self.support, self.top_k, tokens, student)
        if self.target is not None:
            log_t = self.target(log_t, log_s.detach())
        if self.ids:
            log_t, log_s = at_ids(self.ids, log_t), at_ids(self.ids, log_s)
        if self.outside == "renormalise":
            log_t, log_s = log_t.log_softmax(-1), log_s.log_softmax(-1)
        elif self.outside == "renormalise_teacher":
            empty = (log_t <= NOTHING).all(-1, keepdim=True)
            log_t = torch.where(empty, log_t, log_t.log_softmax(-1))
        elif self.outside == "bucket":
            log_t, log_s = add_bucket(log_t), add_bucket(log_s)
        return self.between(log_t, log_s)

    def between(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """The divergence of two distributions."""
        if self.entry_clip is None:
            return self.entries(log_t, log_s).sum(-1)
        least = torch.finfo(log_s.dtype).min / 4  # finite, or an infinite entry would have 0 * inf as its gradient
        entries = self.entries(log_t.clamp_min(least), log_s.clamp_min(least))
        return entries.clamp_max(self.entry_clip).sum(-1)

    def entries(self, log_t: Tensor, log_s: Tensor) -> Tensor:
        """What each token adds to the divergence."""
        raise NotImplementedError
