"""Scored rollouts as one flat batch of tokens, and its cuts into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from tropd.errors import TeacherError
from tropd.objective.evidence import Needs, Tokens, around, trained
from tropd.types import READER, Author, Rollout, TeacherScores, key_of

AsRead = Mapping[str, Sequence[Rollout | None]]
"""By reader, the rollouts as it reads them: perhaps with another prompt before the same responses, None where it reads
nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoredBatch:
    """Rollouts and one row of `tokens` per response token, rollout after rollout.  No gradient."""

    rollouts: tuple[Rollout, ...]
    tokens: Tokens
    measured: bool = False
    """The student was measured in a separate pass, so plans need not wait for the gradient pass."""
    as_read: AsRead = field(default_factory=dict)
    """The rollouts as they were read."""

    def rows_of(self, chosen: Sequence[int]) -> Tensor:
        """Row numbers of some rollouts, in the order given."""
        starts = _starts(self.rollouts)
        device = self.tokens.token_ids_N.device
        rows = [torch.arange(starts[i], starts[i + 1], device=device) for i in chosen]
        return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64, device=device)

    def take(self, chosen: Sequence[int]) -> ScoredBatch:
        """Some rollouts.  Per-sequence fields stay whole, so `sequences_N` keeps its meaning."""
        return ScoredBatch(
            rollouts=tuple(self.rollouts[i] for i in chosen),
            tokens=self.tokens.rows(self.rows_of(chosen)),
            measured=self.measured,
            as_read={name: [texts[i] for i in chosen] for name, texts in self.as_read.items()},
        )

    def only(self, chosen: Sequence[int]) -> ScoredBatch:
        """Some rollouts as a separate batch, with sequences renumbered."""
        part = self.take(chosen)
        new_of = torch.zeros(len(self.rollouts), dtype=torch.int64, device=part.tokens.sequences_N.device)
        index = torch.tensor(list(chosen), dtype=torch.int64, device=new_of.device)
        new_of[index] = torch.arange(len(chosen), device=new_of.device)
        of_reader = ("read_S", "num_read_S")
        fields = ("keys_S", "num_actions_S", "rewards_S", "groups_S", *of_reader)
        held = {f: x[index.to(x.device)] for f in fields if (x := part.tokens.peek(f)) is not None}
        tokens = part.tokens.with_(sequences_N=new_of[part.tokens.sequences_N], **held)
        for name, evidence in tokens.others.items():
            some = {f: evidence[f][index.to(evidence[f].device)] for f in of_reader if f in evidence}
            tokens = tokens.told(name, **some) if some else tokens
        return replace(part, tokens=tokens)


def _starts(rollouts: Sequence[Rollout]) -> list[int]:
    starts = [0]
    for rollout in rollouts:
        starts.append(starts[-1] + len(rollout.response_ids))
    return starts


def make_tokens(rollouts: Sequence[Rollout], seed: int, device: torch.device, vocab_size: int | None) -> Tokens:
    """Everything that rollouts alone tell about their response tokens."""
    lengths = [len(r.response_ids) for r in rollouts]

    def flat(of_rollout: list[Sequence[float]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([x for row in of_rollout for x in row], dtype=dtype, device=device)

    def response(r: Rollout, values: Sequence) -> Sequence:
        return values[len(r.prompt.token_ids) :]

    authors = [response(r, r.authors) for r in rollouts]
    can_train = {Author.STUDENT, Author.TEACHER}
    groups = {name: n for n, name in enumerate(sorted({r.group for r in rollouts}))}
    optional: dict[str, object] = {"groups_S": torch.tensor([groups[r.group] for r in rollouts], device=device)}
    if vocab_size is not None:
        optional["vocab_size"] = vocab_size
    if all(r.reward is not None for r in rollouts):
        optional["rewards_S"] = torch.tensor([r.reward for r in rollouts], dtype=torch.float32, device=device)
    if all(r.model_logprobs or not _wrote(r) for r in rollouts):
        known = [response(r, r.model_logprobs or r.behavior_logprobs) for r in rollouts]
        optional["student_logprobs_N"] = flat(known, torch.float32)
    authors_N = flat(authors, torch.int64)
    sequences_N = torch.arange(len(rollouts), device=device).repeat_interleave(torch.tensor(lengths, device=device))
    num_before_N, num_after_N = around(sequences_N, authors_N)
    return Tokens(
        token_ids_N=flat([r.response_ids for r in rollouts], torch.int64),
        authors_N=authors_N,
        sequences_N=sequences_N,
        num_before_N=num_before_N,
        num_after_N=num_after_N,
        positions_N=flat([range(n) for n in lengths], torch.int64),
        keys_S=torch.tensor([key_of(seed, r.id) for r in rollouts], dtype=torch.int64, device=device),
        num_actions_S=torch.tensor([sum(a in can_train for a in row) for row in authors], device=device),
        behavior_logprobs_N=flat([response(r, r.behavior_logprobs) for r in rollouts], torch.float32),
        **optional,  # type: ignore[arg-type]
    )


def _wrote(rollout: Rollout) -> bool:
    return Author.STUDENT in rollout.authors


_OF_SCORES = {
    "teacher_logprobs_N": ("logprobs_T", Needs.SAMPLED),
    "teacher_topk_ids_NK": ("topk_ids_TK", Needs.TOPK),
    "teacher_topk_logprobs_NK": ("topk_logprobs_TK", Needs.TOPK),
    "teacher_entropy_N": ("entropy_T", Needs.TEACHER_ENTROPY),
    "teacher_at_student_topk_NJ": ("at_student_topk_TJ", Needs.STUDENT_TOPK),
    "teacher_full_logprobs_NV": ("full_logprobs_TV", Needs.FULL),
    "teacher_hidden_NH": ("hidden_TH", Needs.HIDDEN),
    "teacher_lookahead_NJ": ("lookahead_TJ", Needs.LOOKAHEAD),
    "teacher_chunks_N": ("chunks_T", Needs.CHUNKS),
    "teacher_support_N": ("support_T", Needs.CHUNKS),
}


def add_scores(
    tokens: Tokens,
    rollouts: Sequence[Rollout],
    scores: Sequence[TeacherScores],
    asked: Needs = Needs.NOTHING,
    *,
    reader: str = READER,
    columns: Sequence[str] = (),
) -> Tokens:
    """Join a reader's scores to the tokens they describe; a row too many or too few is an error, never a shift.  What
    was asked for has to be there."""
    check_scores(rollouts, scores, asked, columns)
    joined: dict[str, Any] = {}
    for evidence, (name, _) in _OF_SCORES.items():
        rows = [getattr(s, name) for s in scores]
        if rows and all(x is not None for x in rows):
            joined[evidence] = torch.cat(rows).to(tokens.token_ids_N.device)
    if any(s.read_T is not None for s in scores):
        read_N = torch.cat(
            [
                torch.ones(len(r.response_ids), dtype=torch.bool) if s.read_T is None else s.read_T.cpu()
                for r, s in zip(rollouts, scores, strict=True)
            ]
        )
        joined["read_N"] = read_N = read_N.to(tokens.token_ids_N.device)
        counted_N = (read_N & trained(tokens)).long()
        joined["num_read_S"] = torch.zeros_like(tokens.num_actions_S).index_add_(0, tokens.sequences_N, counted_N)
    if columns:
        joined["columns"] = {name: torch.cat([s.columns[name] for s in scores]) for name in columns}
    return tokens.told(reader, **joined)


def check_scores(rollouts: Sequence[Rollout], scores: Any, asked: Needs, columns: Sequence[str] = ()) -> None:
    """Teachers may be anybody's."""
    if not isinstance(scores, Sequence):
        raise TeacherError(f"the teacher returned a {type(scores).__name__}. Return a list of TeacherScores.")
    if len(scores) != len(rollouts):
        raise TeacherError(f"the teacher was given {len(rollouts)} rollouts and scored {len(scores)}.")
    for rollout, score in zip(rollouts, scores, strict=True):
        if not isinstance(score, TeacherScores):
            raise TeacherError(f"the teacher returned a {type(score).__name__} for a rollout. Return a TeacherScores.")
        for name in columns:
            value = score.columns.get(name)
            if not isinstance(value, Tensor) or len(value) != len(rollout.response_ids):
                has = f"{tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
                raise TeacherError(
                    f"the method reads column {name!r} of teacher {score.teacher!r}, a row for each of "
                    f"{len(rollout.response_ids)} response tokens, but the teacher gave {has}."
                )
        for name, need in _OF_SCORES.values():
            value = getattr(score, name)
            if value is None and need not in asked:
                continue
            said, axes = f"teacher {score.teacher!r} gives {name}", len(name.rpartition("_")[2])
            if not isinstance(value, Tensor):
                raise TeacherError(f"{said} as {type(value).__name__}, and a tensor is asked for.")
            if value.dim() != axes or value.is_floating_point() == ("ids" in name):
                kind = "whole numbers" if "ids" in name else "floating-point numbers"
                raise TeacherError(
                    f"{said} with shape {tuple(value.shape)} of {value.dtype}, and {axes} axes of {kind} are asked for."
                )
            if len(value) != len(rollout.response_ids):
                raise TeacherError(
                    f"rollout {rollout.id} has {len(rollout.response_ids)} response tokens, but teacher "
                    f"{score.teacher!r} scored {len(value)} ({name}): misaligned evidence is never trained on."
                )
