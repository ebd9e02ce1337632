"""The fused head gives the loss and the gradient of plain autograd, for every method that it serves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.objective.cases import ALL, K, describe
from tests.objective.variants import VARIANTS
from tropd.model.fused import soften_rows_
from tropd.model.head import Head
from tropd.model.one_pass import can_fuse, fused_loss, read_rows, wanted
from tropd.objective import Context
from tropd.objective.evidence import Needs
from tropd.objective.handed import student_view
from tropd.types import Author

H = 6
SPARSE = [name for name, method in VARIANTS.items() if not method.needs & (Needs.FULL | Needs.STUDENT_HIDDEN)]


def setting(num_tokens: int, vocab: int, *, bias: bool, seed: int = 0, dtype=torch.float64, padded: int = 0):
    """A head, hidden states, and tokens with all evidence about the logits that they give."""
    g = torch.Generator().manual_seed(seed)
    module = nn.Linear(H, vocab + padded, bias=bias)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    module = module.to(dtype)
    head = Head(module=module, vocab_size=vocab, factor=0.7, divisor=1.3)
    hidden = torch.randn(num_tokens, H, generator=g).to(dtype).requires_grad_()
    teacher = torch.randn(num_tokens, vocab, generator=g, dtype=torch.float64).log_softmax(-1)
    sequences = torch.arange(num_tokens) * 3 // max(num_tokens, 1)
    authors = torch.where(torch.arange(num_tokens) % 5 == 0, int(Author.TEACHER), int(Author.STUDENT))
    ids = torch.randint(vocab, (num_tokens,), generator=g)
    logits = head.logits(hidden).detach().double()
    tokens = describe(logits, teacher.to(torch.float64), ids, authors, sequences, min(K, vocab))
    return head, hidden, tokens


def plain(head, hidden, tokens, objective):
    full = head.logits(hidden).to(torch.promote_types(hidden.dtype, torch.float32)).log_softmax(-1)
    evidence = {"teacher_topk_ids_NK": tokens.teacher_topk_ids_NK}
    view = student_view(full, tokens.teacher_full_logprobs_NV, tokens.token_ids_N, ALL, K, evidence)
    return objective(tokens, view, objective.plan(tokens, Context(progress=0.6))).loss


def fused(head, hidden, tokens, objective, tile):
    plan = objective.plan(tokens, Context(progress=0.6))
    ids_NM, view_of = wanted(tokens, objective.needs)

    def judge(rows, logprobs_CM):
        return objective(tokens.rows(rows), view_of(logprobs_CM), plan.rows(rows)).loss

    return fused_loss(head, hidden, ids_NM, judge, tile)


def gradients(loss, head, hidden):
    return torch.autograd.grad(loss, [hidden, *head.module.parameters()], allow_unused=True)


def compare(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", SPARSE)
@pytest.mark.parametrize("bias", [False, True])
def test_every_sparse_method_has_the_plain_loss_and_gradient(name, bias):
    head, hidden, tokens = setting(23, 11, bias=bias, padded=2)
    objective = VARIANTS[name].objective
    a, b = plain(head, hidden, tokens, objective), fused(head, hidden, tokens, objective, tile=5)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    compare(gradients(a, head, hidden), gradients(b, head, hidden), 1e-12)


@settings(max_examples=60, deadline=None)
@given(
    num_tokens=st.integers(1, 40),
    vocab=st.integers(2, 70),
    tile=st.integers(1, 50),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
    name=st.sampled_from(["tropd", "opd", "full_fkl", "faces_union_bucket", "aopd", "tropd_aopd", "seqkd"]),
)
def test_any_shape_and_tile(num_tokens, vocab, tile, bias, seed, name):
    head, hidden, tokens = setting(num_tokens, vocab, bias=bias, seed=seed)
    objective = VARIANTS[name].objective
    if objective.teacher_top_k > tokens.teacher_topk_ids_NK.shape[1] < vocab:
        return
    a, b = plain(head, hidden, tokens, objective), fused(head, hidden, tokens, objective, tile)
    compare(gradients(a, head, hidden), gradients(b, head, hidden), 1e-11)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_outliers_and_only_outliers(share):
    head, hidden, tokens = setting(17, 11, bias=False)
    sure = tokens.student_logprobs_N if share == 0.0 else torch.full_like(tokens.student_logprobs_N, -torch.inf)
    tokens = tokens.with_(teacher_logprobs_N=sure)
    objective = VARIANTS["tropd"].objective
    plan = objective.plan(tokens)
    student = tokens.authors_N == Author.STUDENT
    assert float((plan.weights["outlier"] > 0)[student].double().mean()) == share
    a, b = plain(head, hidden, tokens, objective), fused(head, hidden, tokens, objective, 4)
    compare(gradients(a, head, hidden), gradients(b, head, hidden), 1e-12)


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_do():
    head, hidden, tokens = setting(9, 11, bias=True)
    head.module.requires_grad_(False)
    objective = VARIANTS["tropd"].objective
    (a,) = torch.autograd.grad(fused(head, hidden, tokens, objective, 4), [hidden])
    (b,) = torch.autograd.grad(plain(head, hidden, tokens, objective), [hidden])
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_an_upstream_factor_scales_the_gradient():
    head, hidden, tokens = setting(9, 11, bias=True)
    objective = VARIANTS["opd"].objective
    once, thrice = (gradients(x * fused(head, hidden, tokens, objective, 4), head, hidden) for x in (1.0, 3.0))
    compare([3.0 * g for g in once], thrice, 1e-12)


def test_bfloat16_stays_within_its_tolerance():
    """Gradient of a bfloat16 tile: 1 % of its norm here; the written token's log-probability 2e-3 in the mean."""
    head, hidden, tokens = setting(200, 64, bias=False, dtype=torch.bfloat16)
    objective = VARIANTS["opd"].objective
    reference = Head(module=head.module.to(torch.bfloat16), vocab_size=64, factor=head.factor, divisor=head.divisor)
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_module = nn.Linear(H, 64, bias=False).double()
    with torch.no_grad():
        exact_module.weight.copy_(reference.module.weight.double())
    exact = Head(module=exact_module, vocab_size=64, factor=head.factor, divisor=head.divisor)
    a = gradients(plain(exact, exact_hidden, tokens, objective), exact, exact_hidden)
    b = gradients(fused(head, hidden, tokens, objective, 32), head, hidden)
    for x, y in zip(a, b, strict=True):
        assert y.dtype == torch.bfloat16
        assert float((x - y.double()).norm() / x.norm()) < 1e-2


def test_softmax_of_rows_in_place_and_its_normaliser():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        z = (3 * torch.randn(19, 33)).to(dtype)
        exact = z.double().clone()
        log_sum = soften_rows_(z)
        torch.testing.assert_close(log_sum.double(), exact.logsumexp(-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(z.double(), exact.softmax(-1), rtol=4e-3, atol=1e-6)


def test_heads_that_are_more_than_a_matrix_are_left_to_the_plain_path():
    plain_head = Head(module=nn.Linear(4, 5), vocab_size=5)
    assert can_fuse(plain_head)
    assert not can_fuse(Head(module=nn.Linear(4, 5), vocab_size=5, softcap=30.0))
    assert not can_fuse(Head(module=nn.Sequential(nn.Linear(4, 5)), vocab_size=5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_reading_rows_is_what_the_plain_head_reads(dtype, bias):
    head, hidden, tokens = setting(23, 70, bias=bias, dtype=dtype, padded=3)
    ids_NM = torch.cat([tokens.token_ids_N[:, None], tokens.teacher_topk_ids_NK], 1)
    fast = read_rows(head, hidden.detach(), ids_NM, 7, top_k=9, entropy=True)
    with torch.no_grad():
        slow = head.read(hidden, ids_NM, 7, top_k=9, entropy=True)
    assert fast.keys() == slow.keys()
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}[dtype]
    for name, x in slow.items():
        if name != "topk_ids":
            torch.testing.assert_close(fast[name], x, rtol=0, atol=tolerance)
        elif dtype != torch.bfloat16:  # whose rounding makes ties
            assert torch.equal(fast[name], x)
