"""Teachers score tokens that the student wrote.

A teacher of your own inherits from `Teacher` and gives `capabilities` and `score`; everything else has a default.
`examples/ensemble.py` is one, docs/own_parts.md explains it, and `tropd.testing.check_teacher` tests it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.chunks import Audit
from tropd.objective.evidence import OF_TEACHER, Needs
from tropd.types import Rollout, TeacherScores

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from tropd.distributed.ranks import Ranks
    from tropd.model.forward import Forward

TopKRows = Callable[[Tensor, Tensor], Tensor]
"""(row numbers, the teacher's log-probabilities of their written tokens) -> which of them need the top-k.  Rows are
numbered through all response tokens of the rollouts that are scored."""


@dataclass(frozen=True, eq=False)
class ScoreRequest:
    """A request to a teacher: which rollouts to score, and which evidence to give for each response token."""

    rollouts: Sequence[Rollout]
    needs: Needs = Needs.SAMPLED
    """What the objective reads; a teacher gives the part that is in `OF_TEACHER`."""
    _: KW_ONLY
    top_k: int = 0
    """How many of its likeliest tokens Needs.TOPK means; a smaller vocabulary is given whole."""
    student_topk_ids_TJ: Sequence[Tensor] | None = None
    """Per rollout, the [T, J] ids to score for Needs.STUDENT_TOPK."""
    top_k_rows: TopKRows | None = None
    """A teacher may leave out the top-k of rows that this does not want, with NOTHING as their log-probabilities."""

    candidates_TJ: Sequence[Tensor] | None = None
    """Per rollout, the [T, J] ids in the place of each token to look beyond for Needs.LOOKAHEAD; -1 is no candidate."""
    audit: Audit | None = None
    """How Needs.CHUNKS compares chunks with what the teacher writes."""
    chunks: Sequence[Sequence[range]] | None = None
    """Per rollout, the chunks of its response that Needs.CHUNKS means, in ascending order."""
    columns: Sequence[str] = ()
    """What else the objective reads by name (`TeacherScores.columns`), such as hidden states of several layers."""

    def check(self, teacher: Teacher) -> None:
        """Refuse evidence that the teacher does not offer, and incomplete requests: the first line of every `score`."""
        if beyond := self.needs & OF_TEACHER & ~teacher.capabilities:
            raise EvidenceError(
                f"{beyond} was asked of teacher {teacher.name}, which gives {teacher.capabilities}. Use a method that "
                "reads less, or a teacher in this process, which can answer everything."
            )
        if Needs.TOPK in self.needs and self.top_k < 1:
            raise EvidenceError(
                f"Needs.TOPK was asked of teacher {teacher.name} with top_k = {self.top_k}; give top_k >= 1."
            )
        if Needs.CHUNKS in self.needs and (self.audit is None or self.chunks is None):
            raise EvidenceError(
                f"Needs.CHUNKS was asked of teacher {teacher.name} without chunks; give audit and chunks."
            )
        if Needs.STUDENT_TOPK in self.needs:
            if self.student_topk_ids_TJ is None:
                raise EvidenceError(
                    f"Needs.STUDENT_TOPK was asked of teacher {teacher.name} without ids; "
                    "give student_topk_ids_TJ, a [T, J] tensor per rollout."
                )
            lengths = [len(ids_TJ) for ids_TJ in self.student_topk_ids_TJ]
            assert lengths == self._lengths, "student_topk_ids_TJ: a row per token"
        if Needs.LOOKAHEAD in self.needs and self.candidates_TJ is None:
            raise EvidenceError(
                f"Needs.LOOKAHEAD was asked of teacher {teacher.name} without candidates; "
                "give candidates_TJ, a [T, J] tensor per rollout."
            )

    def take(self, chosen: Sequence[int]) -> ScoreRequest:
        """The same request for some of the rollouts, in the given order."""
        ids_TJ, candidates_TJ, top_k_rows = self.student_topk_ids_TJ, self.candidates_TJ, self.top_k_rows
        if top_k_rows is not None:
            rows_by_rollout = torch.arange(sum(self._lengths)).split(self._lengths)
            top_k_rows = _within(top_k_rows, torch.cat([rows_by_rollout[i] for i in chosen]))
        return replace(
            self,
            rollouts=[self.rollouts[i] for i in chosen],
            student_topk_ids_TJ=None if ids_TJ is None else [ids_TJ[i] for i in chosen],
            candidates_TJ=None if candidates_TJ is None else [candidates_TJ[i] for i in chosen],
            chunks=None if self.chunks is None else [self.chunks[i] for i in chosen],
            top_k_rows=top_k_rows,
        )

    @property
    def _lengths(self) -> list[int]:
        return [len(rollout.response_ids) for rollout in self.rollouts]


def _within(top_k_rows: TopKRows, rows_N: Tensor) -> TopKRows:
    """The same choice for some of the rows."""
    return lambda rows_C, logprobs_C: top_k_rows(rows_N.to(rows_C.device)[rows_C], logprobs_C)


class Teacher:
    """Scores rollouts."""

    name: str = "default"
    capabilities: Needs = Needs.SAMPLED
    """The evidence that it offers; compared with the method's needs before the first step."""
    context: int | None = None
    """The longest text that it scores, prompt and answer together; None if unknown."""
    noise: float = 0.0
    """By how many nats its scores may differ when the same text is scored again."""
    elsewhere: bool = False
    """Whether it computes on other machines, so that another thread may call it while this process is busy."""
    forward: Forward | None = None
    """Its forward pass, if its model is in this process.  Needs.REVERSE_KL and Needs.HIDDEN require one."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order, with a row for each response token.  Evidence that was not
        requested stays None; `request.check(self)` refuses what the teacher does not offer."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing: a teacher defines `score`.")

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        """Called once before the first request: with the student's tokenizer, the number of token ids that student and
        teacher share, and the device of the student."""

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """The single teachers that it consists of, by the names that prompts use."""
        return {"default": self}

    def parts(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], Teacher]]:
        """Single teachers, each with the indices of the rollouts that it scores."""
        return [(list(range(len(rollouts))), self)]

    def shard(self, world: Ranks) -> bool:
        """Shard its weights over the ranks; returns whether it did."""
        return False

    def more_passes(self, number: int) -> int:
        """How many forward passes to add to `number`, so that every rank runs equally many."""
        return 0

    def whole(self) -> AbstractContextManager[None]:
        """A context in which each rank holds all weights, so that ranks may write different numbers of texts."""
        return nullcontext()

    def close(self) -> None:
        """Close connections and files; called once, when the run ends.  A teacher that was given as an object is left
        to its owner."""
