"""Batches with every kind of evidence, and expectations by enumerating the vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd.methods import METHODS
from tropd.objective import Objective, StudentView, Term, TokenLoss, Tokens
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, around
from tropd.objective.handed import student_view, teacher_evidence
from tropd.objective.selectors import STUDENT, Everywhere
from tropd.objective.terms import Selector
from tropd.types import READER, Author, key_of

F64 = torch.float64
ALL = ~Needs.NOTHING
V, K = 11, 4
LAYERS = ("all", "even", "odd")
_NAMES = {name for cls in METHODS.values() for name in cls().objective.readers} - {READER}
OTHERS = tuple(sorted(_NAMES, key=lambda name: (name == "start", name)))
"""Readers beside the teacher that methods have by default.  What each says depends on its place."""


@dataclass(frozen=True)
class Case:
    """A planned batch whose student is a leaf tensor of logits."""

    logits: Tensor
    teacher: Tensor
    tokens: Tokens
    top_k: int = K

    def view(self, rows: Tensor | slice = slice(None)) -> StudentView:
        """Rows of the view are a function of the whole leaf, so gradients land in its shape."""
        full = self.logits.log_softmax(-1)
        evidence = {"teacher_topk_ids_NK": self.tokens.teacher_topk_ids_NK}
        view = student_view(full, self.teacher, self.tokens.token_ids_N, ALL, self.top_k, evidence)
        return view.with_(**states_of(full)).rows(rows)

    def gradient(self, objective: Objective, progress: float = 0.3) -> Tensor:
        plan = objective.plan(self.tokens, Context(progress=progress))
        loss = objective(self.tokens, self.view(), plan).loss
        return torch.autograd.grad(loss, self.logits)[0]


def borrowable(method: Any) -> bool:
    """Whether `distillation_loss` can be given all that it reads: one teacher's probabilities."""
    objective = method.objective
    return set(objective.readers) <= {READER} and not objective.needs & (
        Needs.HIDDEN | Needs.STUDENT_HIDDEN | Needs.LOOKAHEAD
    )


def states_of(full_NV: Tensor) -> dict[str, Any]:
    """Hidden states, of one layer and of several, that are equal where distributions are."""
    return {"hidden_NH": full_NV[:, :5], "columns": {f"states_{layers}": full_NV[:, None, :5] for layers in LAYERS}}


def audited(positions: Tensor) -> dict[str, Tensor]:
    """What a teacher that only writes says: a chunk of two tokens, supported by 3 of 10, and one without an answer."""
    chunk = torch.where(positions // 2 == 1, 1, torch.where(positions == 5, -2, 0))
    return {"teacher_chunks_N": chunk.double(), "teacher_support_N": 3.0 * (chunk == 1).double()}


def describe(
    logits: Tensor, teacher: Tensor, token_ids: Tensor, authors: Tensor, sequences: Tensor, top_k: int = K
) -> Tokens:
    """Tokens with all evidence, for flat rows given in sequence order."""
    full_s, full_t = logits.detach().log_softmax(-1), teacher
    evidence = teacher_evidence(full_t, token_ids, ALL, top_k)
    view = student_view(full_s, full_t, token_ids, ALL, top_k, evidence)
    num = int(sequences.max()) + 1
    positions = torch.cat([torch.arange(int((sequences == s).sum())) for s in range(num)])
    action = (authors == Author.STUDENT) | (authors == Author.TEACHER)
    num_before_N, num_after_N = around(sequences, authors)
    hidden = states_of(full_t)
    tokens = Tokens(
        teacher_hidden_NH=hidden["hidden_NH"],
        columns=hidden["columns"],
        **audited(positions),
        token_ids_N=token_ids,
        num_before_N=num_before_N,
        teacher_lookahead_NJ=full_t.roll(1, -1).gather(-1, evidence["student_topk_ids_NJ"]),
        num_after_N=num_after_N,
        authors_N=authors,
        sequences_N=sequences,
        positions_N=positions,
        keys_S=torch.tensor([key_of(7, s) for s in range(num)]),
        num_actions_S=torch.bincount(sequences[action], minlength=num),
        behavior_logprobs_N=view.logprobs_N,
        student_logprobs_N=view.logprobs_N,
        rewards_S=(torch.arange(num) % 2).to(logits.dtype),
        groups_S=torch.arange(num) // 2,
        **evidence,
    )
    for shift, reader in enumerate(OTHERS, 1):  # opinions of their own, near the teacher's
        theirs = (0.95 * full_t.exp() + 0.05 * full_t.roll(shift, -1).exp()).log()
        tokens = tokens.told(reader, **teacher_evidence(theirs, token_ids, ALL, top_k))
    return tokens


def make_case(seed: int = 0, lengths: tuple[int, ...] = (5, 1, 7, 4, 6, 3), sharp: float = 1.5, top_k: int = K) -> Case:
    """Ragged sequences: some with teacher prefixes, one with context in the middle, one of the teacher's alone."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    logits = (sharp * torch.randn(n, V, generator=g, dtype=F64)).requires_grad_()
    teacher = (sharp * torch.randn(n, V, generator=g, dtype=F64)).log_softmax(-1)
    sequences = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    authors = torch.full((n,), int(Author.STUDENT))
    authors[:2] = Author.TEACHER
    starts = torch.tensor((0, *lengths)).cumsum(0)
    if len(lengths) > 4:
        authors[starts[2] + 2] = Author.ENVIRONMENT
        authors[starts[4] : starts[4] + 3] = Author.TEACHER
        authors[starts[1] : starts[2]] = Author.TEACHER
    token_ids = torch.randint(V, (n,), generator=g)
    return Case(logits, teacher, describe(logits, teacher, token_ids, authors, sequences, top_k), top_k)


def pair(seed: int = 1, sharp: float = 1.0, size: int = V) -> tuple[Tensor, Tensor]:
    """A student's logits (a leaf) and a teacher's log-distribution at one state."""
    g = torch.Generator().manual_seed(seed)
    logits = (sharp * torch.randn(size, generator=g, dtype=F64)).requires_grad_()
    return logits, (sharp * torch.randn(size, generator=g, dtype=F64)).log_softmax(-1)


def one_state(logits: Tensor, teacher: Tensor, top_k: int = K) -> Case:
    """One row per vocabulary entry, all at the same state: row v is the case that v was drawn."""
    size = teacher.shape[-1]
    rows = logits.expand(size, size)
    ids, ones = torch.arange(size), torch.full((size,), int(Author.STUDENT))
    tokens = describe(rows, teacher.expand(size, size), ids, ones, torch.arange(size), top_k)
    return Case(rows, teacher.expand(size, size), tokens, top_k)


def expected_gradient(
    loss: TokenLoss, logits: Tensor, teacher: Tensor, where: Selector | None = None, top_k: int = K
) -> Tensor:
    """E_{x ~ pi_S}[d loss(x) / d logits], exactly."""
    case = one_state(logits, teacher, top_k)
    objective = Objective(Term("t", STUDENT & (where or Everywhere()), loss))
    plan = objective.plan(case.tokens)
    drawn_N = case.tokens.student_logprobs_N.exp()
    size = teacher.shape[-1]
    weighted = type(plan)(
        weights={"t": plan.weights["t"] * size * drawn_N},
        rewards=plan.rewards,
        counts=plan.counts,
        progress=plan.progress,
    )
    total = objective(case.tokens, case.view(), weighted).loss
    return torch.autograd.grad(total, logits)[0]


def gradient_of(divergence: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    return torch.autograd.grad(divergence(logits.log_softmax(-1)), logits)[0]


def reverse_kl(teacher: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: (s.exp() * (s - teacher)).sum()


def forward_kl(teacher: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda s: (teacher.exp() * (teacher - s)).sum()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
