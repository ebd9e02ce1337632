"""Products of half-precision matrices added up in float32, and the sum rounded in place."""

from __future__ import annotations

import mmap
from functools import cache

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath

_ROUNDED = 2**20
"""Elements of a product that are rounded at a time: they stay in cache until they are added."""


class WideSum:
    """An empty sum in float32 or wider, for the gradient of a matrix.

    On a CPU new memory takes longer to get than the sum takes to round, so a half-precision gradient gets none: it is
    written over the front of the sum, and the pages behind it are given back.
    """

    def __init__(self, like_AB: Tensor) -> None:
        dtype = torch.promote_types(like_AB.dtype, torch.float32)
        self.memory: mmap.mmap | None = None
        if like_AB.is_cpu and like_AB.dtype != dtype and like_AB.numel() and hasattr(mmap, "MADV_DONTNEED"):
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self.memory = mmap.mmap(-1, like_AB.numel() * dtype.itemsize, flags=flags)
            self.sum_AB = torch.frombuffer(self.memory, dtype=dtype).view(like_AB.shape)
        else:
            self.sum_AB = torch.empty_like(like_AB, dtype=dtype)

    def rounded(self, dtype: torch.dtype) -> Tensor:
        """The sum in another precision; `sum_AB` may be gone afterwards."""
        if self.memory is None:
            return self.sum_AB.to(dtype)
        TAKEN.add(FastPath.ROUNDED_IN_PLACE)
        wide, done = self.sum_AB.flatten(), 1
        front = wide.view(dtype)[: len(wide)]
        front[0] = wide[0].clone()
        while done < len(wide):  # bytes 2n to 4n are written from 4n to 8n
            front[done : 2 * done] = wide[done : 2 * done]
            done *= 2
        start = -(-front.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
        if start < len(self.memory):
            self.memory.madvise(mmap.MADV_DONTNEED, start, len(self.memory) - start)
        return front.view(self.sum_AB.shape)


def add_product_(sum_AB: Tensor, a_AC: Tensor, b_CB: Tensor, *, first: bool = False) -> None:
    """sum <- sum + a b, where the sum may be wider than the factors; the `first` product fills an empty sum.

    On CUDA one product with a float32 result; elsewhere it is rounded to the factors' precision, some rows at a time.
    """
    if sum_AB.dtype == a_AC.dtype:
        sum_AB.addmm_(a_AC, b_CB, beta=0 if first else 1)
    elif a_AC.is_cuda and sums_wide(a_AC.device, a_AC.dtype):
        torch.addmm(sum_AB.zero_() if first else sum_AB, a_AC, b_CB, out_dtype=torch.float32, out=sum_AB)
    else:
        step = max(1, _ROUNDED // max(b_CB.shape[1], 1))
        rounded_aB = b_CB.new_empty(min(step, len(a_AC)), b_CB.shape[1])
        wide_aB = torch.empty_like(rounded_aB, dtype=sum_AB.dtype)
        for sum_aB, a_aC in zip(sum_AB.split(step), a_AC.split(step), strict=True):
            product_aB = torch.mm(a_aC, b_CB, out=rounded_aB[: len(a_aC)])
            sum_aB.copy_(product_aB) if first else sum_aB.add_(wide_aB[: len(a_aC)].copy_(product_aB))


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
