"""A method's loss from plain tensors, for any training loop.

    output = distillation_loss(TrOPD(), token_ids=ids, authors=authors, logits=logits,
                               teacher_logprobs=t, teacher_top_k=(k_ids, k_logprobs), seed=step)
    output.loss.backward()

Per-token tensors are [B, T] or flat [N]; entry t describes token t itself, so shift your logits first:
`logits = model(ids).logits[:, :-1]`, `token_ids = ids[:, 1:]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.checks import check_top_k
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import ABSENT, StudentView, Tokens, around, at_least_float32, trained
from tropd.objective.handed import (
    Given,
    ReaderEvidence,
    TopK,
    same_width,
    student_view,
    teacher_evidence,
    top_k_of,
    with_readers,
)
from tropd.objective.objective import LossOutput, Objective
from tropd.objective.plan import Counts
from tropd.types import Author, key_of


class HasObjective(Protocol):
    @property
    def objective(self) -> Objective: ...


def distillation_loss(
    method: HasObjective | Objective,
    *,
    token_ids: Tensor,
    authors: Tensor,
    logits: Tensor | None = None,
    logprobs: Tensor | None = None,
    top_k_logprobs: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    teacher_top_k: TopK | None = None,
    teacher_entropy: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    behavior_logprobs: Tensor | None = None,
    sequences: Tensor | None = None,
    rollout_ids: Sequence[object] | None = None,
    rewards: Tensor | None = None,
    groups: Tensor | None = None,
    readers: Mapping[str, ReaderEvidence] | None = None,
    vocab_size: int | None = None,
    seed: int = 0,
    progress: float = 0.0,
    counts: Counts | None = None,
) -> LossOutput:
    """The loss of one batch and every term's part of it.

    authors            1: the student wrote the token, 2: the teacher did, anything else is context
    logits             the student's, with gradient; or its `logprobs` (and `top_k_logprobs` at the teacher's ids)
    teacher_logits     instead of the other teacher_* evidence, if you hold the whole distribution
    readers            what others than the teacher say, by the names that the method's pieces use
    vocab_size         how many ids are tokens of both models: heads that are padded to different widths are cut to it
    behavior_logprobs  of the sampler; by default the student itself, that is, on-policy
    sequences          which sequence each token of flat input belongs to
    seed, rollout_ids  key the trust draws: the same (seed, rollout id, position) gives the same draw in any batch
    counts             global denominators (`Objective.plan(...).counts`) when this is one of several micro-batches

    >>> objective = Objective(Term("pull", STUDENT, ReverseKL()))
    >>> ids, authors = torch.tensor([[0, 1]]), torch.tensor([[1, 1]])  # one sequence of two tokens, by the student
    >>> student, teacher = torch.zeros(1, 2, 3), torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    >>> distillation_loss(objective, token_ids=ids, authors=authors, logits=student, teacher_logits=teacher).loss
    tensor(0.2371)
    """
    objective = method if isinstance(method, Objective) else method.objective
    given = Given(token_ids.shape, token_ids.numel())
    tokens = _describe(given, token_ids, authors, sequences, rollout_ids, seed, rewards, groups)
    _check_counts(counts, objective, tokens)
    logits, teacher_logits = same_width(logits, teacher_logits, vocab_size)
    view, teacher, full_s = _read(
        given, objective, tokens, (logits, logprobs, top_k_logprobs), teacher_logits, teacher_top_k
    )
    own_N = view.logprobs_N.detach()
    optional = {
        "behavior_logprobs": behavior_logprobs,
        "teacher_logprobs": teacher_logprobs,
        "teacher_entropy": teacher_entropy,
    }
    known = {f"{name}_N": given.flat(x, name) for name, x in optional.items() if x is not None}
    tokens = tokens.with_(**{"student_logprobs_N": own_N, "behavior_logprobs_N": own_N, **teacher, **known})
    if teacher_top_k is not None:
        check_top_k(tokens, objective.teacher_top_k)
    tokens, view = with_readers(given, objective, tokens, view, readers or {}, full_s, vocab_size)
    return objective(tokens, view, objective.plan(tokens, Context(progress=progress), counts))


def _check_counts(counts: Counts | None, objective: Objective, tokens: Tokens) -> None:
    """One of several micro-batches can be planned alone only where no token looks further, and may hold nothing."""
    if counts is not None and objective.reach > Reach.TOKEN:
        raise EvidenceError(
            "this method selects or normalises over the whole batch and cannot be planned one micro-batch at a time. "
            "Call Objective.plan on all tokens, then the objective on `tokens.rows(...)` and `plan.rows(...)`."
        )
    if counts is None and not bool(trained(tokens).any()):
        raise EvidenceError(
            f"none of the {len(tokens)} tokens can be trained on: `authors` says 1 where the student wrote a token and "
            "2 where the teacher did. Where another micro-batch holds such tokens, give the `counts` of both."
        )


def _describe(
    given: Given,
    token_ids: Tensor,
    authors: Tensor,
    sequences: Tensor | None,
    rollout_ids: Sequence[object] | None,
    seed: int,
    rewards: Tensor | None,
    groups: Tensor | None,
) -> Tokens:
    token_ids_N, authors_N = given.ids(token_ids, "token_ids"), given.ids(authors, "authors")
    if sequences is not None:
        sequences_N = given.ids(sequences, "sequences")
    elif token_ids.dim() == 2:
        sequences_N = torch.arange(given.shape[0], device=token_ids.device).repeat_interleave(given.shape[1])
    else:
        raise EvidenceError("flat tokens need `sequences`: which sequence each token belongs to.")
    num_sequences = int(sequences_N.max()) + 1 if given.num_tokens else 0
    if given.num_tokens and int(sequences_N.min()) < 0:
        raise EvidenceError(f"`sequences` holds {int(sequences_N.min())}; number the sequences from 0.")
    names = list(rollout_ids) if rollout_ids is not None else list(range(num_sequences))
    if len(names) < num_sequences:
        raise EvidenceError(
            f"there are {num_sequences} sequences, but {len(names)} `rollout_ids`: give one name per sequence."
        )
    for name, x in (("rewards", rewards), ("groups", groups)):
        if x is not None and (x.dim() != 1 or len(x) < len(names)):
            raise EvidenceError(
                f"`{name}` has shape {tuple(x.shape)}, but there are {len(names)} sequences: give one number each."
            )
    action_N = (authors_N == Author.STUDENT) | (authors_N == Author.TEACHER)
    device = token_ids.device
    num_before_N, num_after_N = around(sequences_N, authors_N)
    return Tokens(
        token_ids_N=token_ids_N,
        num_before_N=num_before_N,
        num_after_N=num_after_N,
        authors_N=authors_N,
        sequences_N=sequences_N,
        positions_N=positions_of(sequences_N, authors_N != Author.CONTEXT),
        keys_S=torch.tensor([key_of(seed, name) for name in names], dtype=torch.int64, device=device),
        num_actions_S=torch.bincount(sequences_N[action_N], minlength=len(names)),
        rewards_S=rewards[: len(names)] if rewards is not None else ABSENT,
        groups_S=groups[: len(names)] if groups is not None else ABSENT,
    )


def positions_of(sequences_N: Tensor, counted_N: Tensor) -> Tensor:
    """Per token: how many counted tokens of its sequence come before it."""
    order = torch.argsort(sequences_N, stable=True)
    counted = counted_N[order].long()
    before = counted.cumsum(0) - counted
    start = torch.searchsorted(sequences_N[order].contiguous(), sequences_N[order].contiguous())
    positions_N = torch.empty_like(sequences_N)
    positions_N[order] = before - before[start]
    return positions_N


def _read(
    given: Given,
    objective: Objective,
    tokens: Tokens,
    student: tuple[Tensor | None, Tensor | None, Tensor | None],
    teacher_logits: Tensor | None,
    teacher_top_k: TopK | None,
) -> tuple[StudentView, dict[str, Tensor | int], Tensor | None]:
    """The student's view, the teacher's evidence, and the student's log-probabilities where its logits are given."""
    logits, logprobs, top_k_logprobs = student
    needs, full_t = objective.needs, None
    evidence: dict[str, Tensor | int] = {}
    if teacher_logits is not None:
        full_t = at_least_float32(given.flat(teacher_logits, "teacher_logits", 1)).log_softmax(-1).detach()
        evidence |= teacher_evidence(full_t, tokens.token_ids_N, needs, objective.teacher_top_k)
    if teacher_top_k is not None:
        evidence |= top_k_of(given, teacher_top_k, top_k_logprobs)
    if logits is None:
        if logprobs is None:
            raise EvidenceError("give the student's `logits`, or its `logprobs` of the written tokens.")
        view = StudentView(logprobs_N=given.flat(logprobs, "logprobs"))
        if top_k_logprobs is not None:
            view = view.with_(topk_logprobs_NK=given.flat(top_k_logprobs, "top_k_logprobs", 1))
        return view, evidence, None
    full_s = at_least_float32(given.flat(logits, "logits", 1)).log_softmax(-1)
    evidence["vocab_size"] = full_s.shape[-1]
    view = student_view(full_s, full_t, tokens.token_ids_N, needs, objective.student_top_k, evidence)
    return view, evidence, full_s
