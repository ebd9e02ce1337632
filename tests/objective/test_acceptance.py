"""Acceptance of a draft, by enumeration of every pattern of agreement, and the gradient of Draft-OPD."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.objective.cases import F64, Case, V, close, describe, forward_kl, gradient_of, make_case, reverse_kl
from tropd.methods import DraftOPD
from tropd.objective.acceptance import Accepted, Rejected
from tropd.objective.context import Context
from tropd.objective.evidence import Tokens
from tropd.types import Author


def by_hand(agrees: tuple[bool, ...], block: int, discount: float) -> list[tuple[float, float]]:
    """(accepted, rejected) of each token, as a decoder goes through its draft."""
    weights, fading = [], None
    for place, agree in enumerate(agrees):
        if place % block == 0:
            fading = None
        if fading is None and not agree:
            fading = 1.0
        weights.append((1.0, 0.0) if fading is None else (0.0, fading))
        if fading is not None:
            fading *= discount
    return weights


def drafted(agrees: tuple[bool, ...], tokens: Tokens) -> Tokens:
    """The student's tokens in their order, agreeing with the teacher as is said."""
    theirs, own = tokens.teacher_topk_ids_NK.clone(), tokens.student_topk_ids_NJ.clone()
    rows = (tokens.authors_N == Author.STUDENT).nonzero().flatten()
    for n, agree in zip(rows.tolist(), agrees, strict=True):
        own[n, 0] = theirs[n, 0] if agree else (theirs[n, 0] + 1) % V
    return tokens.with_(student_topk_ids_NJ=own)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 16])
def test_acceptance_masks_of_every_pattern_are_those_of_a_decoder(block):
    tokens = make_case(lengths=(7,)).tokens  # two tokens of the teacher, five of the student
    for agrees in itertools.product((False, True), repeat=5):
        draft = drafted(agrees, tokens)
        expected = torch.tensor([(0.0, 0.0)] * 2 + by_hand(agrees, block, 0.5))
        close(Accepted(block)(draft, Context()), expected[:, 0], 0.0)
        close(Rejected(block, 0.5)(draft, Context()).float(), expected[:, 1], 0.0)


@pytest.mark.parametrize("block", [1, 2, 3, 16])
def test_blocks_begin_anew_with_each_response_and_count_the_students_tokens_alone(block):
    case = make_case(3)
    tokens, generator = case.tokens, torch.Generator().manual_seed(1)
    student = [n for n in range(len(tokens)) if int(tokens.authors_N[n]) == Author.STUDENT]
    agrees = (torch.rand(len(student), generator=generator) < 0.6).tolist()
    draft, expected = drafted(tuple(agrees), tokens), torch.zeros(len(tokens), 2)
    for s in range(6):
        own = [i for i, n in enumerate(student) if int(tokens.sequences_N[n]) == s]
        if own:
            found = by_hand(tuple(agrees[i] for i in own), block, 0.8)
            expected[[student[i] for i in own]] = torch.tensor(found)
    order = torch.randperm(len(tokens), generator=generator)
    close(Accepted(block)(draft.rows(order), Context()), expected[order, 0], 0.0)
    close(Rejected(block, 0.8)(draft.rows(order), Context()).float(), expected[order, 1], 1e-7)


def test_models_that_agree_everywhere_have_nothing_rejected_and_no_response_nothing_at_all():
    tokens = make_case().tokens
    alike = tokens.with_(student_topk_ids_NJ=tokens.teacher_topk_ids_NK)
    assert torch.equal(Accepted()(alike, Context()) > 0, tokens.authors_N == Author.STUDENT)
    assert not Rejected()(alike, Context()).any()
    nobody = tokens.with_(authors_N=torch.full_like(tokens.authors_N, int(Author.ENVIRONMENT)))
    assert not Accepted()(nobody, Context()).any() and not Rejected()(nobody, Context()).any()


def test_a_rejection_without_discount_after_it_counts_once():
    tokens = drafted((True, False, True, False, True), make_case(lengths=(7,)).tokens)
    assert Rejected(16, 0.0)(tokens, Context()).tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_the_gradient_is_forward_kl_on_accepted_and_faded_reverse_kl_on_rejected_tokens():
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(6, V, generator=generator, dtype=F64).requires_grad_()
    teacher = torch.randn(6, V, generator=generator, dtype=F64).log_softmax(-1)
    teacher[[0, 1, 3, 4]] = logits.detach()[[0, 1, 3, 4]].mul(2).log_softmax(-1)  # the same likeliest token
    students = torch.full((6,), int(Author.STUDENT))
    case = Case(
        logits, teacher, describe(logits, teacher, torch.arange(6), students, torch.zeros(6, dtype=torch.int64))
    )
    accepted, rejected = (0, 1, 4), {2: 1.0, 3: 0.5, 5: 1.0}
    expected = torch.zeros_like(logits)
    for n in range(6):
        forward = gradient_of(lambda s, n=n: forward_kl(teacher[n])(s[n]), logits)
        reverse = gradient_of(lambda s, n=n: reverse_kl(teacher[n])(s[n]), logits)
        expected += forward / 3 if n in accepted else 0.7 * rejected[n] * reverse / 2.5
    close(case.gradient(DraftOPD(block=4, discount=0.5, weight=0.7).objective), expected, 1e-12)
