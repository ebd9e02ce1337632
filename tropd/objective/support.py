"""Both models' log-probabilities on a set of tokens, and the mass outside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tropd.errors import ConfigError, EvidenceError, TopKLeftOut
from tropd.objective.evidence import StudentView, Tokens, at_least_float32

Support = Literal["full", "teacher_top_k", "student_top_k", "union", "intersection", "difference"]
"""Over which tokens; "difference" is the union without the intersection: what one of both models considers."""
Outside = Literal["ignore", "stop_gradient", "generalised", "bucket", "renormalise", "renormalise_teacher"]
"""What happens to the probability outside the support; the losses say what each choice converges to."""


NOTHING = -1e4
"""A log-probability whose exp is 0 in every dtype, finite so that no gradient turns into inf - inf."""


def weighed_gaps(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q) at each token with 0 log 0 = 0, in value and in gradient."""
    present = p > 0
    return p * (torch.where(present, log_p, 0.0) - torch.where(present, log_q, 0.0))


def expected_gap(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_v p (log p - log q)."""
    return weighed_gaps(p, log_p, log_q).sum(-1)


def log_mixture(log_t: Tensor, log_s: Tensor, share: float) -> Tensor:
    """log(share T + (1 - share) S), 0 < share < 1; where both are 0 it is -inf and has no gradient instead of NaN."""
    nowhere = (log_t == -torch.inf) & (log_s == -torch.inf)
    log_t, log_s = log_t.masked_fill(nowhere, 0.0), log_s.masked_fill(nowhere, 0.0)
    mixed = torch.logaddexp(log_t + math.log(share), log_s + math.log1p(-share))
    return mixed.masked_fill(nowhere, -torch.inf)


def on_support(kind: Support, top_k: int, tokens: Tokens, student: StudentView) -> tuple[Tensor, Tensor]:
    """(log T, log S) on the support; entries that do not belong hold NOTHING on both sides."""
    if kind == "full":
        return at_least_float32(tokens.teacher_full_logprobs_NV), at_least_float32(student.full_logprobs_NV)
    if kind == "teacher_top_k":
        return _teacher(top_k, tokens, student)
    if kind == "student_top_k":
        return _student(top_k, tokens, student)
    teacher_t, teacher_s = _teacher(top_k, tokens, student)
    own_t, own_s = _student(top_k, tokens, student)
    teacher_ids, own_ids = tokens.teacher_topk_ids_NK[:, :top_k], tokens.student_topk_ids_NJ[:, :top_k]
    same_NKJ = teacher_ids[:, :, None] == own_ids[:, None, :]
    if kind == "intersection":
        outside_NK = ~same_NKJ.any(-1)
        return _drop(teacher_t, outside_NK), _drop(teacher_s, outside_NK)
    twice_NJ = same_NKJ.any(-2)
    if kind == "difference":
        twice_NK = same_NKJ.any(-1)
        teacher_t, teacher_s = _drop(teacher_t, twice_NK), _drop(teacher_s, twice_NK)
    return torch.cat([teacher_t, _drop(own_t, twice_NJ)], -1), torch.cat([teacher_s, _drop(own_s, twice_NJ)], -1)


def as_planned(tokens: Tokens) -> StudentView:
    """The student's likeliest tokens and the teacher's as of planning: what a selector can see of a support."""
    return StudentView(
        logprobs_N=tokens.student_logprobs_N,
        topk_logprobs_NK=tokens.student_at_topk_NK,
        student_topk_logprobs_NJ=tokens.student_topk_logprobs_NJ,
    )


def ids_in(path: Path | str) -> tuple[int, ...]:
    """The token ids of a text file, in its order, with spaces or lines between them; for a method's knob."""
    try:
        ids = tuple(int(word) for word in Path(path).read_text().split())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"token ids were to be read from {path}: {error}. Write whole numbers, one a line."
        ) from error
    if not ids:
        raise ConfigError(f"token ids were to be read from {path}, which holds none. Write whole numbers, one a line.")
    return ids


def at_ids(ids: Sequence[int], whole_NV: Tensor) -> Tensor:
    """The columns of these tokens, in their order."""
    if max(ids) >= whole_NV.shape[-1]:
        raise EvidenceError(f"token {max(ids)} was asked for, but the vocabulary has {whole_NV.shape[-1]} tokens.")
    return whole_NV[..., torch.tensor(ids, device=whole_NV.device)]


def _drop(x: Tensor, where: Tensor) -> Tensor:
    return x.masked_fill(where, NOTHING)


def _teacher(top_k: int, tokens: Tokens, student: StudentView) -> tuple[Tensor, Tensor]:
    log_t = tokens.teacher_topk_logprobs_NK
    _check_width("the teacher's", top_k, log_t, tokens)
    if log_t.numel() and float(log_t[:, 0].min()) <= NOTHING:
        raise TopKLeftOut(
            f"the teacher's top-k was left out for {int((log_t[:, 0] <= NOTHING).sum())} tokens that this term reads: "
            "the student's log-probabilities have moved further than expected since the rollout. Give the teacher to "
            "`train_step`, so that the micro-batch can be scored again."
        )
    return at_least_float32(log_t[:, :top_k]), at_least_float32(student.topk_logprobs_NK[:, :top_k])


def _student(top_k: int, tokens: Tokens, student: StudentView) -> tuple[Tensor, Tensor]:
    log_t = tokens.teacher_at_student_topk_NJ
    _check_width("the student's", top_k, log_t, tokens)
    return at_least_float32(log_t[:, :top_k]), at_least_float32(student.student_topk_logprobs_NJ[:, :top_k])


def _check_width(whose: str, top_k: int, given: Tensor, tokens: Tokens) -> None:
    width, vocab_size = given.shape[-1], tokens.peek("vocab_size")
    if width >= top_k or (vocab_size is not None and width == int(vocab_size)):
        return
    raise EvidenceError(
        f"{whose} top-{top_k} log-probabilities were asked for, but only {width} per token were given. "
        f"Ask for top_k <= {width}, or a teacher that returns more (vLLM: --max-logprobs {top_k})."
    )


def add_bucket(log_p: Tensor) -> Tensor:
    """Append log(1 - mass): everything outside the support as one more token."""
    rest = (1.0 - log_p.exp().sum(-1, keepdim=True)).clamp_min(torch.finfo(log_p.dtype).eps)
    return torch.cat([log_p, rest.log()], -1)
