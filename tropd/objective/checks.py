"""Evidence that cannot be right is refused before anything is computed from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.evidence import Tokens, at_least_float32, trained
from tropd.types import Author

_LOGPROBS = (
    "behavior_logprobs_N",
    "student_logprobs_N",
    "teacher_logprobs_N",
    "teacher_topk_logprobs_NK",
    "teacher_at_student_topk_NJ",
    "student_topk_logprobs_NJ",
    "student_at_topk_NK",
    "teacher_lookahead_NJ",
    "teacher_full_logprobs_NV",
)
_SLACK = 1e-2  # a bfloat16 log-softmax can exceed 0 by rounding; logits exceed it by far more
_SUM_SLACK = 0.1  # sums over the vocabulary collect more of it
_IDS = ("token_ids_N", "teacher_topk_ids_NK", "student_topk_ids_NJ")


def check_tokens(tokens: Tokens) -> None:
    """Check all evidence before a plan is made from it."""
    vocab_size = tokens.peek("vocab_size")
    size = None if vocab_size is None else int(vocab_size)
    for name in _LOGPROBS:
        low, high = _ends(tokens.peek(name), name)
        if high > _SLACK:
            raise EvidenceError(
                f"`{name}` holds {high:.4g}, but a log-probability is never above 0. "
                "Were logits given? Apply log_softmax over the whole vocabulary first."
            )
        if low == -math.inf and name in ("behavior_logprobs_N", "student_logprobs_N"):
            _check_written(tokens, name)
    for name in ("student_entropy_N", "teacher_entropy_N"):
        low, high = _ends(tokens.peek(name), name)
        most = math.inf if size is None else math.log(size)
        if low < -_SUM_SLACK or high > most + _SUM_SLACK:
            limit = "at least 0" if size is None else f"from 0 to ln {size} = {most:.4g}"
            raise EvidenceError(
                f"`{name}` holds numbers from {low:.4g} to {high:.4g}, but an entropy in nats is {limit}. Give "
                "-sum_v p ln p over the whole vocabulary."
            )
    low, _ = _ends(tokens.peek("reverse_kl_N"), "reverse_kl_N")
    if low < -_SUM_SLACK:
        raise EvidenceError(f"`reverse_kl_N` holds {low:.4g}, but a divergence is never below 0.")
    _ends(tokens.peek("rewards_S"), "rewards_S")
    for name in _IDS:
        ids = tokens.peek(name)
        if ids is None or ids.numel() == 0:
            continue
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or (size is not None and high >= size):
            limit = f"0..{size - 1}" if size is not None else ">= 0"
            raise EvidenceError(f"`{name}` holds ids from {low} to {high}, but the vocabulary is {limit}.")


def _ends(x: Tensor | None, name: str) -> tuple[float, float]:
    """The smallest and the largest number; NaN is refused."""
    if x is None or x.numel() == 0:
        return 0.0, 0.0
    low, high = torch.stack(x.aminmax()).tolist()
    if math.isnan(low) or math.isnan(high):
        raise EvidenceError(f"`{name}` holds NaN in {int(torch.isnan(x).sum())} places: its source is broken.")
    return low, high


def _check_written(tokens: Tokens, name: str) -> None:
    """A ratio of two zeros is NaN, and a comparison with NaN would drop the token in silence."""
    wrong = int(((getattr(tokens, name) == -math.inf) & (tokens.authors_N == Author.STUDENT)).sum())
    if wrong:
        raise EvidenceError(
            f"`{name}` is -inf on {wrong} tokens that the student wrote, but a token that was drawn has a probability "
            "above 0. Are the tokens and the log-probabilities of the same rollouts, unshifted?"
        )


def check_ids(x: Tensor, name: str) -> None:
    """Ids and authors are whole numbers."""
    if x.is_floating_point() or x.is_complex():
        raise EvidenceError(f"`{name}` holds {x.dtype} numbers; give whole numbers, such as torch.int64.")


def check_top_k(tokens: Tokens, top_k: int) -> None:
    """The teacher's top-k, where tokens can be trained on: distinct ids, probabilities of one distribution, the
    likeliest first where fewer are read than were given."""
    rows = trained(tokens)
    ids_NK, logprobs_NK = tokens.teacher_topk_ids_NK[rows], at_least_float32(tokens.teacher_topk_logprobs_NK[rows])
    if ids_NK.numel() == 0:
        return
    ordered_NK = ids_NK.sort(-1).values
    twice = int((ordered_NK[:, 1:] == ordered_NK[:, :-1]).any(-1).sum())
    if twice:
        raise EvidenceError(
            f"the ids of `teacher_top_k` name a token more than once in {twice} of {len(ids_NK)} rows, so it would be "
            "counted twice. Give each id once, and fewer of them where the teacher says no more."
        )
    largest = float(logprobs_NK.exp().sum(-1).max())
    if largest > 1.0 + _SUM_SLACK:
        raise EvidenceError(
            f"the probabilities of `teacher_top_k` sum to {largest:.4g} in a row, but a distribution's parts sum to at "
            "most 1. Give log-probabilities of the whole vocabulary's softmax at temperature 1."
        )
    rising = int((logprobs_NK[:, 1:] > logprobs_NK[:, :-1] + _SLACK).any(-1).sum())
    if rising and ids_NK.shape[1] > top_k:
        raise EvidenceError(
            f"`teacher_top_k` has {ids_NK.shape[1]} tokens a row and the method reads the first {top_k}, but {rising} "
            "rows are not sorted. Give the likeliest first."
        )
