"""Chunks of a response and the likelihood of OmniOPD: which tokens, towards what, and with which gradient."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from tests.objective.cases import F64, make_case
from tropd.errors import ConfigError, EvidenceError
from tropd.methods import OmniOPD
from tropd.objective import Objective, StudentView, Term
from tropd.objective.chunks import Audit, Audited, ChunkSupport, WeighedLikelihood, chunks_of, peaks
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.objective.examples import some_tokens
from tropd.objective.selectors import STUDENT
from tropd.types import READER, Author

S, T = int(Author.STUDENT), int(Author.TEACHER)


def test_a_chunk_begins_at_a_peak() -> None:
    entropies = [0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.1, 0.0]
    assert peaks(entropies, [S] * 8, Audit(chunks=1, tokens=3)) == [range(1, 4)]
    assert peaks(entropies, [S] * 8, Audit(chunks=2, tokens=3)) == [range(1, 4), range(5, 8)]
    assert peaks(entropies, [S] * 8, Audit(chunks=9, tokens=3)) == [range(1, 4), range(5, 8)]
    assert peaks(entropies, [S] * 8, Audit(chunks=3, tokens=1)) == [range(1, 2), range(3, 4), range(5, 6)]


def test_where_entropies_are_equal_the_first_is_taken() -> None:
    assert peaks([0.5] * 7, [S] * 7, Audit(chunks=2, tokens=3)) == [range(0, 3), range(3, 6)]


def test_a_response_that_is_shorter_than_a_chunk_is_one_chunk() -> None:
    assert peaks([0.1, 0.9], [S, S], Audit()) == [range(0, 2)]
    assert peaks([], [], Audit()) == []


def test_no_chunk_holds_what_the_teacher_wrote() -> None:
    authors = [T, T, S, S, S, T, S, S]
    entropies = [9.0, 8.0, 0.1, 0.2, 0.3, 7.0, 0.2, 0.1]
    assert peaks(entropies, authors, Audit(tokens=2)) == [range(3, 5), range(6, 8)]
    assert peaks(entropies, authors, Audit(tokens=50)) == [range(2, 5)]
    assert peaks([1.0, 1.0], [T, T], Audit()) == []


def test_chunks_never_overlap_and_leave_no_room_that_was_wanted() -> None:
    draw = random.Random(0)
    for _ in range(200):
        number = draw.randint(1, 40)
        entropies = [draw.choice([0.0, 0.5, draw.random()]) for _ in range(number)]
        audit = Audit(chunks=draw.randint(1, 6), tokens=draw.randint(1, 9))
        chunks = peaks(entropies, [S] * number, audit)
        covered = [t for chunk in chunks for t in chunk]
        size = min(audit.tokens, number)
        assert covered == sorted(set(covered)) and set(covered) <= set(range(number))
        assert all(len(chunk) == size for chunk in chunks) and len(chunks) <= audit.chunks
        if len(chunks) < audit.chunks:
            assert not any(all(abs(t - c.start) >= size for c in chunks) for t in range(number - size + 1))
        assert chunks == peaks(entropies, [S] * number, audit)


def test_the_chunks_of_a_response_do_not_depend_on_its_neighbours() -> None:
    case, audit = make_case(), Audit(chunks=2, tokens=2)
    whole = chunks_of(case.tokens, audit)
    for number, chunks in enumerate(whole):
        rows = (case.tokens.sequences_N == number).nonzero().flatten()
        part = case.tokens.rows(rows)
        alone = part.with_(sequences_N=torch.zeros(len(rows), dtype=torch.int64), keys_S=part.keys_S[:1])
        assert chunks_of(alone, audit) == [chunks]


def test_the_target_is_between_0_and_1_and_has_no_gradient() -> None:
    draw = torch.Generator().manual_seed(0)
    logprobs = -5 * torch.rand(60, generator=draw, dtype=F64)
    for alpha in (0.0, 1.0, 30.0):
        chunk = torch.arange(60) // 4 % 5
        support = torch.where(chunk > 0, 10 * torch.rand(15, generator=draw, dtype=F64).repeat_interleave(4), 0.0)
        tokens = some_tokens(
            student_logprobs_N=logprobs.requires_grad_(), teacher_chunks_N=chunk.to(F64), teacher_support_N=support
        )
        term = Term("audited", STUDENT & Audited(), WeighedLikelihood(ChunkSupport(alpha=alpha)))
        target = Objective(term).plan(tokens.with_(student_logprobs_N=logprobs.detach())).rewards["audited"]
        assert float(target.min()) >= 0.0 and float(target.max()) <= 1.0 and not target.requires_grad
        own = chunk == 2
        groups = own.nonzero().flatten().split(4)
        if alpha == 1.0:  # one sequence: the chunks with the same number are one group here
            mean = logprobs.detach()[own].mean()
            assert torch.allclose(target[groups[0]], (support[groups[0]] + mean.exp()) / 11)


def test_the_expected_gradient_is_that_of_the_expected_support() -> None:
    """Over every token that could have been drawn: -sum_x S(x) target(x) grad log S(x) = -grad sum_x S(x) target(x)."""
    size, continuations = 7, 4
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3), dtype=F64, requires_grad=True)
    full = logits.log_softmax(-1)
    support = torch.linspace(0, continuations, size, dtype=F64)
    tokens = some_tokens(
        token_ids_N=torch.arange(size),
        sequences_N=torch.arange(size),
        student_logprobs_N=full.detach(),
        teacher_chunks_N=torch.ones(size, dtype=F64),
        teacher_support_N=support,
    )
    loss = WeighedLikelihood(ChunkSupport(continuations=continuations, alpha=0.5))
    plan = Objective(Term("audited", STUDENT & Audited(), loss)).plan(tokens)
    per_token = loss(tokens, StudentView(logprobs_N=full), plan.rewards["audited"])
    (found,) = torch.autograd.grad((full.detach().exp() * per_token).sum(), logits, retain_graph=True)
    target = (support + 0.5 * full.detach().exp()) / (continuations + 0.5)
    (wanted,) = torch.autograd.grad(-(full.exp() * target).sum(), logits)
    assert torch.allclose(found, wanted, atol=1e-12)


def test_audited_tokens_get_the_likelihood_and_all_others_the_exact_anchor() -> None:
    """At each row: target (S - onehot) / N in a chunk, beta (S - start) / N elsewhere, nothing on the teacher's."""
    case, method = make_case(), OmniOPD(beta=0.3)
    found = case.gradient(method.objective)
    tokens, student = case.tokens, case.logits.detach().softmax(-1)
    start = tokens.of("start").teacher_full_logprobs_NV.exp()
    number = int(((tokens.authors_N == S) | (tokens.authors_N == T)).sum())
    own, chunk_N = tokens.authors_N == S, tokens.teacher_chunks_N
    for n in range(len(tokens)):
        wanted = torch.zeros_like(student[n])
        if own[n] and chunk_N[n] > 0:
            same = (tokens.sequences_N == tokens.sequences_N[n]) & (chunk_N == chunk_N[n])
            confidence = math.exp(float(tokens.student_logprobs_N[same].mean()))
            onehot = torch.nn.functional.one_hot(tokens.token_ids_N[n], student.shape[-1])
            wanted = (float(tokens.teacher_support_N[n]) + confidence) / 11 * (student[n] - onehot) / number
        elif own[n]:  # a chunk without its continuations as well
            wanted = 0.3 * (student[n] - start[n]) / number
        assert torch.allclose(found[n], wanted, atol=1e-12), n
    assert {-2.0, 0.0, 1.0} == set(chunk_N[own].tolist())


def test_a_student_that_never_moved_has_no_gradient_outside_of_its_chunks() -> None:
    case = make_case()
    start = case.logits.detach().log_softmax(-1)
    case = type(case)(case.logits, case.teacher, case.tokens.told("start", teacher_full_logprobs_NV=start))
    outside = case.tokens.teacher_chunks_N <= 0
    assert case.gradient(OmniOPD().objective)[outside].abs().max() < 1e-15


@pytest.mark.parametrize("knob", ["chunks", "chunk_tokens", "continuations"])
def test_nothing_to_audit_is_refused(knob: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{knob}.*at least 1"):
        OmniOPD(**{knob: 0})


def test_the_objective_says_what_is_asked_of_whom() -> None:
    objective = OmniOPD(chunks=3, chunk_tokens=4, continuations=5).objective
    assert objective.audit_of(READER) == Audit(chunks=3, tokens=4, continuations=5)
    assert objective.audit_of("start") is None
    assert objective.asks == {READER: Needs.CHUNKS, "start": Needs.FULL}
    with pytest.raises(ConfigError, match="asked for chunks in 2 ways"):
        terms = [Term(str(n), STUDENT, WeighedLikelihood(ChunkSupport(chunks=n))) for n in (1, 2)]
        Objective(*terms).audit_of(READER)


@pytest.mark.parametrize(("chunk", "support"), [(11.0, 3.0), (1.0, 10.5), (1.0, -0.5), (1.0, math.nan)])
def test_what_a_teacher_of_your_own_cannot_mean_is_refused(chunk: float, support: float) -> None:
    tokens = some_tokens(student_logprobs_N=[-1.0], teacher_chunks_N=[chunk], teacher_support_N=[support])
    with pytest.raises(EvidenceError, match="teacher_chunks_N|teacher_support_N"):
        ChunkSupport()(torch.zeros(1), tokens, Context())
