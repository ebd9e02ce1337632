"""A half-precision gradient in the memory of its float32 sum."""

from __future__ import annotations

import gc
import resource
import sys

import pytest
import torch
from torch import nn

from tests.model.test_fused import gradients
from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.head import Head
from tropd.model.one_pass import fused_loss
from tropd.model.products import WideSum

HALVES = [torch.bfloat16, torch.float16]


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(2**13, 2**8), (1049, 1009), (512, 2), (3, 5), (1, 1)])
def test_a_sum_rounded_in_place_is_the_sum_rounded(dtype, shape):
    TAKEN.clear()
    wide = WideSum(torch.empty(shape, dtype=dtype))
    exact = torch.randn(shape) * 10.0 ** torch.randint(-9, 6, shape)
    wide.sum_AB.copy_(exact)
    rounded = wide.rounded(dtype)
    assert rounded.is_contiguous() and torch.equal(rounded, exact.to(dtype))
    assert FastPath.ROUNDED_IN_PLACE in TAKEN


def test_a_sum_of_nothing_is_rounded_to_nothing():
    assert WideSum(torch.empty(0, 5, dtype=torch.bfloat16)).rounded(torch.bfloat16).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wide_gradient_is_its_sum(dtype):
    wide = WideSum(torch.empty(1049, 1009, dtype=dtype))
    assert wide.rounded(dtype) is wide.sum_AB and wide.sum_AB.dtype == dtype


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_gradient_keeps_half_of_the_memory_of_its_sum_and_then_none():
    before, size = resident_bytes(), 2**26
    wide = WideSum(torch.empty(2**12, 2**12, dtype=torch.bfloat16))
    wide.sum_AB.fill_(1.0)
    assert resident_bytes() - before > 0.9 * size
    gradient = wide.rounded(torch.bfloat16)
    assert resident_bytes() - before < 0.6 * size
    del wide, gradient
    gc.collect()
    assert resident_bytes() - before < 0.1 * size


@pytest.mark.parametrize("tile_vocab", [None, 5000])
def test_a_large_head_has_the_gradient_of_its_float32_sum(tile_vocab):
    """A factor of 2 leaves the sum as it is and is exact, so the gradients agree to the last bit."""
    generator = torch.Generator().manual_seed(0)
    module = nn.Linear(64, 17_000, bias=False).bfloat16()
    head = Head(module=module, vocab_size=17_000)
    hidden = torch.randn(23, 64, generator=generator).bfloat16().requires_grad_()
    ids_NM = torch.randint(17_000, (23, 3), generator=generator)

    def loss():
        return fused_loss(head, hidden, ids_NM, lambda rows, x_CM: x_CM.square().sum(), 10, tile_vocab)

    TAKEN.clear()
    twice = gradients(2.0 * loss(), head, hidden)
    assert FastPath.ROUNDED_IN_PLACE not in TAKEN
    once = gradients(loss(), head, hidden)
    assert FastPath.ROUNDED_IN_PLACE in TAKEN
    for x, y in zip(once, twice, strict=True):
        assert torch.equal(2.0 * x, y)
    loss().backward()
    loss().backward()
    torch.testing.assert_close(module.weight.grad, twice[1], rtol=0, atol=0)


def test_a_second_backward_pass_through_a_sum_that_is_gone_is_an_error():
    head = Head(module=nn.Linear(64, 17_000, bias=False).bfloat16(), vocab_size=17_000)
    hidden, ids_NM = torch.randn(3, 64).bfloat16().requires_grad_(), torch.zeros(3, 1, dtype=torch.int64)
    loss = fused_loss(head, hidden, ids_NM, lambda rows, x_CM: x_CM.sum(), 2)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
