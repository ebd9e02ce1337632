"""Teachability: the score against sums written out, its zeros, its ties and its statistics over the whole batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.objective.cases import K, close, make_case
from tropd.methods import OPD, TAOPD
from tropd.methods.ta_opd import Teachable
from tropd.objective.context import Context
from tropd.objective.evidence import Tokens
from tropd.objective.measures import Normalised, ReverseKLAt
from tropd.objective.selectors import TopFraction
from tropd.objective.teachability import Teachability, TeacherMassOnStudent, UnionForwardKL
from tropd.types import Author


def students(tokens: Tokens) -> torch.Tensor:
    return tokens.authors_N == Author.STUDENT


def by_hand(case, n: int) -> tuple[float, float]:
    """D and C of one token, from the whole distributions."""
    t, s = case.teacher[n].exp(), case.logits.detach()[n].softmax(-1)
    own, theirs = set(s.topk(K).indices.tolist()), set(t.topk(K).indices.tolist())
    union = sorted(own | theirs)
    p, q = t[union] / t[union].sum(), s[union] / s[union].sum()
    return float((p * (p / q).log()).sum()), float(t[sorted(own)].sum())


def test_both_factors_are_their_sums():
    case = make_case(2)
    expected = torch.tensor([by_hand(case, n) for n in range(len(case.tokens))], dtype=torch.float64)
    close(UnionForwardKL(K)(case.tokens, Context()), expected[:, 0], 1e-12)
    close(TeacherMassOnStudent(K)(case.tokens, Context()), expected[:, 1], 1e-12)


def test_the_score_is_the_product_of_both_scaled_by_the_quantiles_of_the_batch():
    case = make_case(2)
    member = students(case.tokens)
    expected = torch.ones(int(member.sum()), dtype=torch.float64)
    for column in torch.tensor([by_hand(case, n) for n in member.nonzero().flatten().tolist()], dtype=torch.float64).T:
        low, high = np.quantile(column.numpy(), [0.05, 0.95])
        expected *= ((column - low) / (high - low)).clamp(0, 1)
    close(Teachability(K)(case.tokens, Context())[member], expected, 1e-12)


def test_the_score_is_0_where_the_teacher_gives_the_students_top_k_nothing():
    case = make_case(2)
    at_own = case.tokens.teacher_at_student_topk_NJ.clone()
    at_own[::2] = -torch.inf
    score_N = Teachability(K)(case.tokens.with_(teacher_at_student_topk_NJ=at_own), Context())
    assert bool((score_N[::2] == 0).all()) and bool((score_N[1::2] > 0).any())
    nowhere = case.tokens.with_(teacher_at_student_topk_NJ=torch.full_like(at_own, -torch.inf))
    assert not Teachability(K)(nowhere, Context()).any()
    assert not TAOPD(top_k=K).objective.plan(nowhere).weights["reverse_kl"].any()


def test_a_divergence_that_is_infinite_counts_as_the_highest():
    case = make_case(2)
    at_theirs = case.tokens.student_at_topk_NK.clone()
    at_theirs[7, 0] = -torch.inf
    own = case.tokens.student_topk_logprobs_NJ.clone()
    same = case.tokens.student_topk_ids_NJ[7] == case.tokens.teacher_topk_ids_NK[7, 0]
    own[7, same] = -torch.inf
    tokens = case.tokens.with_(student_at_topk_NK=at_theirs, student_topk_logprobs_NJ=own)
    assert float(UnionForwardKL(K)(tokens, Context())[7]) == torch.inf
    assert float(Normalised(UnionForwardKL(K), "robust")(tokens, Context())[7]) == 1.0
    assert bool(Teachability(K)(tokens, Context()).isfinite().all())


@pytest.mark.parametrize(("number", "scaled"), [(0.0, 0.0), (0.7, 1.0)])
def test_robust_scaling_of_numbers_that_are_all_the_same(number, scaled):
    case = make_case(2)
    same = case.tokens.with_(reverse_kl_N=torch.full_like(case.tokens.reverse_kl_N, number))
    member = students(case.tokens)
    assert set(Normalised(ReverseKLAt(), "robust")(same, Context())[member].tolist()) == {scaled}


def test_the_best_5_percent_are_kept_and_ties_with_them():
    case = make_case(2)
    kept = TopFraction(Teachability(K), 0.05, least=0.0)(case.tokens, Context()) > 0
    score_N, member = Teachability(K)(case.tokens, Context()), students(case.tokens)
    assert int(kept.sum()) == 1 and float(score_N[kept]) == float(score_N[member].max())


def test_a_batch_of_one_token_keeps_it_where_both_models_differ():
    case = make_case(2)
    one = case.tokens.rows(torch.tensor([3]))
    assert float(TAOPD(top_k=K).objective.plan(one).weights["reverse_kl"][0]) > 0
    assert float(Teachability(K)(one, Context())[0]) == 1.0


def test_as_an_extra_it_chooses_the_same_tokens_of_any_method():
    case, own = make_case(2), TAOPD(top_k=K, fraction=0.3, denominator="actions")
    close(case.gradient(OPD(plus=(Teachable(top_k=K, fraction=0.3),)).objective), case.gradient(own.objective), 0.0)
