"""Softmax over the rows of a tile of logits in one launch each, for CUDA (Triton).

    m <- max(m, max z_b)                                   over blocks b of one row, in float32
    s <- s exp(m_old - m) + sum exp(z_b - m)
    q <- (q + s_old (m_old - m)) exp(m_old - m) + sum exp(z_b - m) (z_b - m)
    log sum exp z = m + log s,   p = exp(z - m - log s),   H = log s - q / s

One program per row, on the grid's first axis, the only one that may exceed 65,535; offsets are 64 bits wide.  A row is
read twice and written once where the softmax is wanted, and read once where only its normaliser is.

The mathematics is tested under Triton's interpreter, and the kernels compile for NVIDIA targets.  The compiled code has
not been run on a device yet: so `agree` compares it with PyTorch before its first use.  Imported only for CUDA tensors.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LARGEST_BLOCK = 4096
_LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _sums(row, size, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    """m, s and q of one row."""
    highest = tl.full((), _LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    moment = tl.full((), 0.0, tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < size, other=float("-inf")).to(tl.float32)
        new = tl.maximum(highest, tl.max(z, 0))
        shrink = tl.exp(highest - new)
        e = tl.exp(z - new)
        if ENTROPY:  # 0 * -inf would be NaN
            moment = shrink * (moment + total * (highest - new)) + tl.sum(tl.where(e == 0.0, 0.0, e * (z - new)), 0)
        total = total * shrink + tl.sum(e, 0)
        highest = new
    return highest, total, moment


@triton.jit
def _soften(row, size, log_sum, BLOCK: tl.constexpr):
    """In place z <- exp(z - L) of one row."""
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(row + at, mask=at < size, other=float("-inf")).to(tl.float32)
        tl.store(row + at, tl.exp(z - log_sum).to(row.dtype.element_ty), mask=at < size)


@triton.jit
def _softmax(z_ptr, log_sum_ptr, stride, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    row = z_ptr + index * stride
    highest, total, _ = _sums(row, size, False, BLOCK)  # pyright: ignore[reportArgumentType]
    log_sum = highest + tl.log(total)
    _soften(row, size, log_sum, BLOCK)
    tl.store(log_sum_ptr + index, log_sum)


@triton.jit
def _log_sum(z_ptr, log_sum_ptr, entropy_ptr, stride, size, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    highest, total, moment = _sums(z_ptr + index * stride, size, ENTROPY, BLOCK)
    tl.store(log_sum_ptr + index, highest + tl.log(total))
    if ENTROPY:
        tl.store(entropy_ptr + index, tl.log(total) - moment / total)


@triton.jit
def _exponentials(z_ptr, log_sum_ptr, stride, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64)
    _soften(z_ptr + index * stride, size, tl.load(log_sum_ptr + index), BLOCK)


def softmax_rows_(z_CV: Tensor, block: int | None = None) -> Tensor:
    """In place z <- softmax(z); gives log sum exp z of each row in float32."""
    log_sum_C = _empty(z_CV, len(z_CV))
    if len(z_CV):
        with _on(z_CV):
            _softmax[(len(z_CV),)](z_CV, log_sum_C, z_CV.stride(0), z_CV.shape[1], **_shape(z_CV, block))
    return log_sum_C


def log_sum_rows(z_CV: Tensor, entropy: bool = False, block: int | None = None) -> tuple[Tensor, Tensor]:
    """log sum exp z of each row, and the entropy if wanted (else no rows); z is only read."""
    log_sum_C, entropy_C = _empty(z_CV, len(z_CV)), _empty(z_CV, len(z_CV) if entropy else 0)
    if len(z_CV):
        with _on(z_CV):
            shape = {"ENTROPY": entropy, **_shape(z_CV, block)}
            _log_sum[(len(z_CV),)](z_CV, log_sum_C, entropy_C, z_CV.stride(0), z_CV.shape[1], **shape)
    return log_sum_C, entropy_C


def exponentials_(z_CV: Tensor, log_sum_C: Tensor, block: int | None = None) -> None:
    """In place z <- exp(z - L), with L of each row in float32."""
    assert log_sum_C.dtype == torch.float32 and log_sum_C.is_contiguous() and len(log_sum_C) == len(z_CV)
    if len(z_CV):
        with _on(z_CV):
            _exponentials[(len(z_CV),)](z_CV, log_sum_C, z_CV.stride(0), z_CV.shape[1], **_shape(z_CV, block))


@cache
def agree(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels compile on this device and give PyTorch's numbers; if not, a warning says why."""
    z_CV = (torch.arange(3 * 5003, device=device).reshape(3, 5003) * 0.37).sin().mul(9).to(dtype)
    exact_CV = z_CV.double().log_softmax(-1)
    exact_C = z_CV.double().logsumexp(-1)
    p_CV, q_CV = z_CV.clone(), z_CV.clone()
    try:
        log_sum_C = softmax_rows_(p_CV)
        read_C, entropy_C = log_sum_rows(z_CV, entropy=True)
        exponentials_(q_CV, read_C)
        found = [log_sum_C, read_C, entropy_C, p_CV, q_CV]
        exact = [exact_C, exact_C, -(exact_CV.exp() * exact_CV).sum(-1), exact_CV.exp(), exact_CV.exp()]
        worst = max(float((a.double() - b).abs().max()) for a, b in zip(found, exact, strict=True))
        problem = None if worst < 2e-3 else f"they differ from PyTorch by {worst:.1e}"
    except Exception as error:  # Triton raises many kinds, a missing C compiler among them
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        warnings.warn(
            f"Triton kernels were wanted for {dtype} on {device}, but {problem}. PyTorch's own operations are used: "
            "the same numbers, more memory and time. A C compiler (gcc) is the usual thing to install.",
            RuntimeWarning,
            stacklevel=2,
        )
    return problem is None


def _empty(z_CV: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=z_CV.device)


def _on(z_CV: Tensor) -> torch.cuda.device:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(z_CV.device if z_CV.is_cuda else -1)


def _shape(z_CV: Tensor, block: int | None) -> dict[str, Any]:
    assert z_CV.dtype in DTYPES and z_CV.stride(1) == 1
    block = block or min(_LARGEST_BLOCK, triton.next_power_of_2(z_CV.shape[1]))
    return {"BLOCK": block, "num_warps": 8 if block >= 2048 else 4}
