"""Evidence as plain tensors: what another training loop holds of the student and of those who read its responses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tropd.errors import EvidenceError
from tropd.objective.checks import check_ids, check_top_k
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.objective import Objective
from tropd.objective.support import expected_gap
from tropd.types import READER

TopK = tuple[Tensor, Tensor]
"""(ids, log-probabilities), each [..., K], likeliest first."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ReaderEvidence:
    """What a reader beside the teacher says of the same tokens: what the method reads of it, shaped as for the teacher.

    >>> objective = Objective(Term("pull", STUDENT, ReverseKL(reader="elder")))
    >>> ids, authors, student = torch.tensor([[0, 1]]), torch.tensor([[1, 1]]), torch.zeros(1, 2, 3)
    >>> elder = ReaderEvidence(logits=torch.tensor([[[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]))
    >>> distillation_loss(objective, token_ids=ids, authors=authors, logits=student, readers={"elder": elder}).loss
    tensor(0.2371)
    """

    logits: Tensor | None = None
    """Instead of the rest, if you hold the whole distribution; log-probabilities serve as well, such as those that
    `Mean` and `Steered` make."""
    logprobs: Tensor | None = None
    top_k: TopK | None = None
    top_k_logprobs: Tensor | None = None
    """The student's at its ids, if you give no `logits` of the student."""
    entropy: Tensor | None = None
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    """What else it says of each token, by name."""
    read: Tensor | None = None
    """A bool for each sequence: whether it read that one; by default it read all."""


@dataclass(frozen=True)
class Given:
    """The common shape of the caller's per-token tensors."""

    shape: torch.Size
    num_tokens: int

    def ids(self, x: Tensor, name: str, extra: int = 0) -> Tensor:
        check_ids(x, name)
        return self.flat(x, name, extra)

    def flat(self, x: Tensor, name: str, extra: int = 0) -> Tensor:
        if x.shape[: x.dim() - extra] != self.shape:
            raise EvidenceError(
                f"`{name}` has shape {tuple(x.shape)}, but token_ids has {tuple(self.shape)}; per-token tensors share "
                "their leading shape."
            )
        return x.reshape(self.num_tokens, *x.shape[x.dim() - extra :])


def same_width(
    logits: Tensor | None, other: Tensor | None, size: int | None, name: str = "teacher_logits"
) -> tuple[Tensor | None, Tensor | None]:
    """Both heads, cut to the tokens that they share: padding takes no part in a distribution."""
    widths = {"logits": logits, name: other}
    columns = {name: x.shape[-1] for name, x in widths.items() if x is not None and x.dim()}
    heads = " and ".join(f"`{name}` has {width} columns" for name, width in columns.items())
    if size is not None and not 1 <= size <= min(columns.values(), default=size):
        raise EvidenceError(f"vocab_size = {size} was given, but {heads}. Give a number that no head falls short of.")
    if size is None and len(set(columns.values())) > 1:
        raise EvidenceError(
            f"{heads}: no divergence between them is defined. If the rows beyond the shared tokens are padding, give "
            f"vocab_size = the number of shared tokens, at most {min(columns.values())}."
        )
    return tuple(x if x is None else x[..., :size] for x in (logits, other))  # type: ignore[return-value]


def top_k_of(given: Given, top_k: TopK, student: Tensor | None, name: str = "teacher_top_k") -> dict[str, Tensor]:
    """A reader's likeliest tokens; `student` are its log-probabilities there, if they are given."""
    ids, values = top_k
    found = {
        "teacher_topk_ids_NK": given.ids(ids, f"{name} ids", 1),
        "teacher_topk_logprobs_NK": given.flat(values, f"{name} log-probabilities", 1),
    }
    widths = {"ids": ids, "log-probabilities": values, "`top_k_logprobs` of the student": student}
    counts = {name: x.shape[-1] for name, x in widths.items() if x is not None}
    if len(set(counts.values())) > 1:
        raise EvidenceError(
            f"`{name}` has, for each token, "
            + ", ".join(f"{n} {what}" for what, n in counts.items())
            + ". Give as many of each."
        )
    return found


def with_readers(
    given: Given,
    objective: Objective,
    tokens: Tokens,
    view: StudentView,
    readers: Mapping[str, ReaderEvidence],
    full_s: Tensor | None,
    vocab_size: int | None,
) -> tuple[Tokens, StudentView]:
    """The same with what other readers say; `full_s` are the student's log-probabilities [N, V], if they are known."""
    wanted = [name for name in objective.readers if name != READER]
    if missing := [name for name in wanted if name not in readers]:
        raise EvidenceError(
            f"the method reads what reader {missing[0]!r} says, which was not given. Give readers = "
            f"{{{missing[0]!r}: ReaderEvidence(...)}}."
        )
    if idle := [name for name in readers if name not in wanted]:
        why = "is said by the teacher_* arguments" if idle[0] == READER else "is read by no part of the method"
        raise EvidenceError(f"`readers` has {idle[0]!r}, which {why}. Leave it out.")
    for name, said in readers.items():
        found, at_NK = _said(given, objective, tokens, name, said, full_s, vocab_size)
        own = {key: found.pop(key) for key in list(found) if key not in Tokens.of_reader}
        if "student_topk_ids_NJ" in own and view.peek("student_topk_logprobs_NJ") is None and full_s is not None:
            view = view.with_(student_topk_logprobs_NJ=full_s.gather(-1, own["student_topk_ids_NJ"]))
        tokens = tokens.with_(**{key: x for key, x in own.items() if tokens.peek(key) is None})
        tokens = tokens.told(name, **found)
        if said.top_k is not None:
            check_top_k(tokens.of(name), objective.top_k_of(name))
        if at_NK is not None:
            view = view.told(name, topk_logprobs_NK=at_NK)
    return tokens, view


def _said(
    given: Given,
    objective: Objective,
    tokens: Tokens,
    name: str,
    said: ReaderEvidence,
    full_s: Tensor | None,
    vocab_size: int | None,
) -> tuple[dict[str, Any], Tensor | None]:
    """One reader's evidence, and the student's log-probabilities at its likeliest tokens."""
    whose, full_r = f"of reader {name!r}", None
    found: dict[str, Any] = {}
    if said.logits is not None:
        _, logits = same_width(full_s, said.logits, vocab_size, f"logits {whose}")
        assert logits is not None
        full_r = at_least_float32(given.flat(logits, f"logits {whose}", 1)).log_softmax(-1).detach()
        found = teacher_evidence(full_r, tokens.token_ids_N, objective.needs_of(name), objective.top_k_of(name))
    if said.top_k is not None:
        found |= top_k_of(given, said.top_k, said.top_k_logprobs, f"top_k {whose}")
    for what, x in (("logprobs", said.logprobs), ("entropy", said.entropy)):
        if x is not None:
            found[f"teacher_{what}_N"] = given.flat(x, f"{what} {whose}")
    if said.columns:
        found["columns"] = {
            column: given.flat(x, f"column {column!r} {whose}", x.dim() - len(given.shape))
            for column, x in said.columns.items()
        }
    if said.read is not None:
        found["read_S"] = said.read
    if full_s is None:
        at = said.top_k_logprobs
        return found, None if at is None else given.flat(at, f"top_k_logprobs {whose}", 1)
    needs = objective.needs_of(name)
    own = student_view(full_s, full_r, tokens.token_ids_N, needs, objective.student_top_k, found)
    return found, own.peek("topk_logprobs_NK")


def teacher_evidence(full_t: Tensor, token_ids_N: Tensor, needs: Needs, top_k: int) -> dict[str, Tensor | int]:
    """Everything that `needs` asks of a teacher, from its whole log-distribution [N, V]."""
    top = full_t.topk(min(max(top_k, 1), full_t.shape[-1]), -1)
    return {
        "teacher_logprobs_N": _written(full_t, token_ids_N),
        "teacher_topk_ids_NK": top.indices,
        "teacher_topk_logprobs_NK": top.values,
        "teacher_entropy_N": torch.special.entr(full_t.exp()).sum(-1),
        "vocab_size": full_t.shape[-1],
        **({"teacher_full_logprobs_NV": full_t} if Needs.FULL in needs else {}),
    }


def _written(full: Tensor, token_ids_N: Tensor) -> Tensor:
    """Log-probabilities of the written tokens; the plan refuses ids out of range by name."""
    return full.gather(-1, token_ids_N.clamp(0, full.shape[-1] - 1)[:, None]).squeeze(-1)


def student_view(
    full_s: Tensor,
    full_t: Tensor | None,
    token_ids_N: Tensor,
    needs: Needs,
    top_k: int,
    evidence: dict[str, Tensor | int],
) -> StudentView:
    """The student's view from its whole log-distribution; what only plans read goes into `evidence`."""
    view = StudentView(logprobs_N=_written(full_s, token_ids_N))
    fixed = full_s.detach()
    evidence["student_entropy_N"] = torch.special.entr(fixed.exp()).sum(-1)
    if full_t is not None:
        evidence["reverse_kl_N"] = expected_gap(fixed.exp(), fixed, full_t)
    if Needs.STUDENT_AT_TOPK in needs and isinstance(ids_NK := evidence.get("teacher_topk_ids_NK"), Tensor):
        evidence["student_at_topk_NK"] = fixed.gather(-1, ids_NK)
    if Needs.STUDENT_TOPK in needs and full_t is not None:
        own, ids_NJ = fixed.topk(min(top_k, fixed.shape[-1]), -1)
        evidence |= {"student_topk_ids_NJ": ids_NJ, "student_topk_logprobs_NJ": own}
        evidence["teacher_at_student_topk_NJ"] = full_t.gather(-1, ids_NJ)
        view = view.with_(student_topk_logprobs_NJ=full_s.gather(-1, ids_NJ))
    ids_NK = evidence.get("teacher_topk_ids_NK")
    if Needs.TOPK in needs and isinstance(ids_NK, Tensor):
        view = view.with_(topk_logprobs_NK=full_s.gather(-1, ids_NK.clamp(0, full_s.shape[-1] - 1)))
    return view.with_(full_logprobs_NV=full_s) if Needs.FULL in needs else view
