"""Products of half-precision matrices added up in float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_ROWS = 4096
"""Rows whose product is rounded at a time: it stays in cache until it is added."""


def add_product_(sum_AB: Tensor, a_AC: Tensor, b_CB: Tensor) -> None:
    """sum <- sum + a b, where the sum may be wider than the factors.

    On CUDA one product with a float32 result; elsewhere it is rounded to the factors' precision, some rows at a time.
    """
    if sum_AB.dtype == a_AC.dtype:
        sum_AB.addmm_(a_AC, b_CB)
    elif a_AC.is_cuda and sums_wide(a_AC.device, a_AC.dtype):
        torch.addmm(sum_AB, a_AC, b_CB, out_dtype=torch.float32, out=sum_AB)
    else:
        rounded_aB = b_CB.new_empty(min(_ROWS, len(a_AC)), b_CB.shape[1])
        for sum_aB, a_aC in zip(sum_AB.split(_ROWS), a_AC.split(_ROWS), strict=True):
            sum_aB.add_(torch.mm(a_aC, b_CB, out=rounded_aB[: len(a_aC)]))


@cache
def sums_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this PyTorch adds half-precision products to a float32 sum in place, and rightly."""
    a, b = (torch.linspace(0.1, 1.0, 256, device=device).reshape(16, 16).to(dtype) for _ in range(2))
    sum_AB = torch.ones(16, 16, device=device)
    exact = 1.0 + a.double() @ b.double()
    try:
        torch.addmm(sum_AB, a, b, out_dtype=torch.float32, out=sum_AB)
    except (TypeError, RuntimeError):  # before 2.8 there is no such argument, and some versions refuse a float32 sum
        return False
    return bool((sum_AB.double() - exact).abs().max() < 1e-4)
