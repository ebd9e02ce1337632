"""Where gradient descent on each truncated divergence ends: at the teacher, or not."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objective.cases import F64, close, one_state
from tropd.objective import ForwardKL, ReverseKL
from tropd.objective.evidence import StudentView


def fixed_point(loss, t, start, steps=4000, lr=0.5):
    """Where gradient descent on one state ends."""
    z = start.clone().requires_grad_()
    tokens = one_state(z, t, top_k=loss.top_k).tokens.rows(slice(0, 1))
    for _ in range(steps):
        log_s = z.log_softmax(-1)
        view = StudentView(logprobs_N=log_s[:1], topk_logprobs_NK=log_s[tokens.teacher_topk_ids_NK])
        value = loss(tokens, view, None).sum()
        with torch.no_grad():
            z -= lr * torch.autograd.grad(value, z)[0]
    return z.detach().log_softmax(-1)


@pytest.fixture(scope="module")
def head_and_tail():
    """A teacher with .785 of its mass on 4 tokens, and a student that has .6 there."""
    t = torch.cat([torch.full((4,), 0.785 / 4), torch.full((12,), 0.215 / 12)]).to(F64)
    t[:4] *= torch.tensor([1.3, 1.1, 0.9, 0.7], dtype=F64)
    start = torch.cat([torch.full((4,), 0.6 / 4), torch.full((12,), 0.4 / 12)]).to(F64).log()
    return t.log(), start


def test_raw_top_k_reverse_kl_has_its_fixed_point_at_one_over_e(head_and_tail):
    t, start = head_and_tail
    s = fixed_point(ReverseKL(support="teacher_top_k", top_k=4), t, start)
    close((s - t).exp()[:4], torch.full((4,), math.exp(-1), dtype=F64), 1e-6)


@pytest.mark.parametrize("outside", ["stop_gradient", "generalised", "bucket"])
def test_corrected_top_k_reverse_kl_has_its_fixed_point_at_the_teacher(head_and_tail, outside):
    t, start = head_and_tail
    s = fixed_point(ReverseKL(support="teacher_top_k", top_k=4, outside=outside), t, start)
    close((s - t).exp()[:4], torch.ones(4, dtype=F64), 1e-6)


def test_renormalised_reverse_kl_gets_the_shape_right_and_leaves_the_mass(head_and_tail):
    t, start = head_and_tail
    s = fixed_point(ReverseKL(support="teacher_top_k", top_k=4, outside="renormalise"), t, start, steps=8000)
    close(s[:4].log_softmax(-1), t[:4].log_softmax(-1), 1e-5)
    assert float(s[:4].exp().sum()) < 0.7


def test_raw_top_k_forward_kl_converges_to_the_renormalised_teacher(head_and_tail):
    t, start = head_and_tail
    s = fixed_point(ForwardKL(support="teacher_top_k", top_k=4), t, start, steps=8000)
    close(s[:4], t[:4].log_softmax(-1), 2e-2)


@pytest.mark.parametrize("outside", ["generalised", "bucket"])
def test_corrected_top_k_forward_kl_converges_to_the_teacher(head_and_tail, outside):
    t, start = head_and_tail
    s = fixed_point(ForwardKL(support="teacher_top_k", top_k=4, outside=outside), t, start)
    close((s - t).exp()[:4], torch.ones(4, dtype=F64), 1e-6)
