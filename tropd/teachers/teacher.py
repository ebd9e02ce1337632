"""Whoever judges tokens that it did not write.

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
    """What a teacher is asked: which rollouts to score, and what to say of each response token."""

    rollouts: Sequence[Rollout]
    needs: Needs = Needs.SAMPLED
    """What the objective reads; a teacher answers the part that is in `OF_TEACHER`."""
    _: KW_ONLY
    top_k: int = 0
    """How many of its likeliest tokens Needs.TOPK asks for; a vocabulary that is smaller is given whole."""
    student_topk_ids_TJ: Sequence[Tensor] | None = None
    """Per rollout, the [T, J] ids that Needs.STUDENT_TOPK asks to be scored."""
    top_k_rows: TopKRows | None = None
    """A teacher may leave out the top-k of rows that this does not want, with NOTHING as their log-probabilities."""

    def check(self, teacher: Teacher) -> None:
        """Refuse what the teacher does not give, and questions that lack a part: the first line of every `score`."""
        if beyond := self.needs & OF_TEACHER & ~teacher.capabilities:
            raise EvidenceError(
                f"{beyond} was asked of teacher {teacher.name}, which gives {teacher.capabilities}. Use a method that "
                "reads less, or a teacher in this process, which can answer everything."
            )
        if Needs.TOPK in self.needs and self.top_k < 1:
            raise EvidenceError(
                f"Needs.TOPK was asked of teacher {teacher.name} with top_k = {self.top_k}; give top_k >= 1."
            )
        if Needs.STUDENT_TOPK in self.needs:
            if self.student_topk_ids_TJ is None:
                raise EvidenceError(
                    f"Needs.STUDENT_TOPK was asked of teacher {teacher.name} without ids; "
                    "give student_topk_ids_TJ, a [T, J] tensor per rollout."
                )
            lengths = [len(ids_TJ) for ids_TJ in self.student_topk_ids_TJ]
            assert lengths == self._lengths, "student_topk_ids_TJ: a row per token"

    def take(self, chosen: Sequence[int]) -> ScoreRequest:
        """The same questions about some of the rollouts, in the order given."""
        ids_TJ, top_k_rows = self.student_topk_ids_TJ, self.top_k_rows
        if top_k_rows is not None:
            rows_by_rollout = torch.arange(sum(self._lengths)).split(self._lengths)
            top_k_rows = _within(top_k_rows, torch.cat([rows_by_rollout[i] for i in chosen]))
        return replace(
            self,
            rollouts=[self.rollouts[i] for i in chosen],
            student_topk_ids_TJ=None if ids_TJ is None else [ids_TJ[i] for i in chosen],
            top_k_rows=top_k_rows,
        )

    @property
    def _lengths(self) -> list[int]:
        return [len(rollout.response_ids) for rollout in self.rollouts]


def _within(top_k_rows: TopKRows, rows_N: Tensor) -> TopKRows:
    """The same question about some of the rows."""
    return lambda rows_C, logprobs_C: top_k_rows(rows_N.to(rows_C.device)[rows_C], logprobs_C)


class Teacher:
    """Scores rollouts."""

    name: str = "default"
    capabilities: Needs = Needs.SAMPLED
    """What it can say, compared with what the method reads before the first step."""
    context: int | None = None
    """The longest text that it scores, prompt and answer together; None where that is not known."""
    noise: float = 0.0
    """By how many nats it may differ from itself when it is asked again."""
    elsewhere: bool = False
    """It computes on other machines, so it may be asked from another thread while this process is busy."""
    forward: Forward | None = None
    """Its forward pass, where its model is in this process.  Needs.REVERSE_KL and Needs.HIDDEN take one."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        """One TeacherScores per rollout, in order, with a row for each response token.  What was not asked for stays
        None; `request.check(self)` refuses what the teacher cannot say."""
        raise NotImplementedError(f"{type(self).__name__} scores nothing: a teacher defines `score`.")

    def prepare(self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, device: torch.device) -> None:
        """Called once before the first request: with the student's tokenizer, the number of token ids that student and
        teacher share, and the device of the student."""

    @property
    def teachers(self) -> Mapping[str, Teacher]:
        """The single teachers that it is made of, by the names that prompts have for them."""
        return {"default": self}

    def parts(self, rollouts: Sequence[Rollout]) -> list[tuple[list[int], Teacher]]:
        """Single teachers, each with the numbers of the rollouts that it scores."""
        return [(list(range(len(rollouts))), self)]

    def shard(self, world: Ranks) -> bool:
        """Let each rank hold a part of its weights; whether it does."""
        return False

    def more_passes(self, number: int) -> int:
        """How many forward passes to add to a number of them, so that every rank runs as many."""
        return 0

    def whole(self) -> AbstractContextManager[None]:
        """A context in which each rank holds all of its weights: ranks may ask for different numbers of texts."""
        return nullcontext()

    def close(self) -> None:
        """Give up connections and files; called once, when the run ends.  A teacher that was given as an object is left
        to its owner."""
