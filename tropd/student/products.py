"""Products of half-precision matrices added up in float32."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def add_product_(sum_AB: Tensor, a_AC: Tensor, b_CB: Tensor) -> None:
    """sum <- sum + a b, where the sum may be wider than the factors.

    On CUDA one product with a float32 result; elsewhere the product is rounded to the factors' precision first.
    """
    if sum_AB.dtype == a_AC.dtype:
        sum_AB.addmm_(a_AC, b_CB)
    elif a_AC.is_cuda and sums_wide(a_AC.device, a_AC.dtype):
        torch.addmm(sum_AB, a_AC, b_CB, out_dtype=torch.float32, out=sum_AB)
    else:
        sum_AB.add_(torch.mm(a_AC, b_CB))


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
