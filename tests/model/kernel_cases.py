"""What is asked of the Triton kernels, for tests under the interpreter (`test_kernels.py`) and on a GPU (`tests/gpu`).

`python -m tests.model.kernel_cases`, with TRITON_INTERPRET=1, prints what the interpreter finds.
"""

from __future__ import annotations

import json
import math
import warnings

import torch
from torch import Tensor, nn

from tropd.model.fused import kernels_for, log_sum_exp, soften_rows_
from tropd.model.head import Head
from tropd.model.one_pass import fused_loss, read_rows

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
SHAPES = [(1, 1, 16), (3, 7, 16), (5, 133, 32), (2, 64, 64), (2, 65, 64)]
"""Rows, vocabulary and block: one token, a part of a block, several blocks, exactly one, one and a token."""


def tile(rows: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    z_CV = 4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    return z_CV.to(dtype).to(device)


def errors(z_CV: Tensor, block: int | None = None) -> dict[str, float]:
    """How far every kernel is from float64, in place on a view whose rows do not touch."""
    from tropd.model import kernels

    exact_CV, exact_C = z_CV.double().softmax(-1), z_CV.double().logsumexp(-1)
    wide_CV = torch.cat([z_CV, torch.full_like(z_CV, 7.0)], 1)
    p_CV, q_CV, read_CV = (wide_CV.clone()[:, : z_CV.shape[1]] for _ in range(3))
    log_sum_C = kernels.softmax_rows_(p_CV, block)
    read_C, entropy_C = kernels.log_sum_rows(read_CV, True, block)
    plain_C, nothing = kernels.log_sum_rows(read_CV, False, block)
    kernels.exponentials_(q_CV, read_C, block)
    exact_H = torch.special.entr(exact_CV).sum(-1)
    beyond = [x._base[:, z_CV.shape[1] :] for x in (p_CV, q_CV, read_CV) if x._base is not None]
    assert len(nothing) == 0 and len(beyond) == 3
    pairs = {
        "log_sum": (log_sum_C, exact_C),
        "read": (read_C, exact_C),
        "plain": (plain_C, exact_C),
        "entropy": (entropy_C, exact_H),
        "softmax": (p_CV, exact_CV),
        "exponentials": (q_CV, exact_CV),
        "left": (read_CV, z_CV.double()),
        "beyond": (torch.stack(beyond), torch.full((), 7.0, device=z_CV.device)),
    }
    return {name: float((a.double() - b).abs().max()) for name, (a, b) in pairs.items()}


def head_of(dtype: torch.dtype, device: str = "cpu") -> tuple[Head, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    module = nn.Linear(4, 37, bias=True)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g))
    hidden_NH = torch.randn(5, 4, generator=g).to(dtype).to(device).requires_grad_()
    ids_NM = torch.randint(37, (5, 3), generator=g).to(device)
    return Head(module=module.to(dtype).to(device), vocab_size=37), hidden_NH, ids_NM


def squares(rows: slice, logprobs_CM: Tensor) -> Tensor:
    return logprobs_CM.square().sum()


def numbers(dtype: torch.dtype, tile_vocab: int | None, device: str = "cpu") -> dict[str, list]:
    """Loss, gradients and readings of the whole head."""
    head, hidden_NH, ids_NM = head_of(dtype, device)
    loss = fused_loss(head, hidden_NH, ids_NM, squares, 3, tile_vocab)
    names, inputs = ("hidden", "weight", "bias"), [hidden_NH, *head.module.parameters()]
    found = dict(zip(names, torch.autograd.grad(loss, inputs), strict=True))
    read = read_rows(head, hidden_NH.detach(), ids_NM, 3, entropy=True, tile_vocab=tile_vocab)
    return {name: x.detach().double().tolist() for name, x in {"loss": loss, **found, **read}.items()}


def extremes() -> dict[str, float]:
    """Rows that a softmax without care gets wrong."""
    from tropd.model import kernels

    z_CV = torch.full((4, 40), -math.inf)
    z_CV[0, 33] = 2.0
    z_CV[1] = 1e30
    z_CV[2] = torch.linspace(-1e5, 1e5, 40)
    z_CV[3, 20] = math.nan
    log_sum_C, entropy_C = kernels.log_sum_rows(z_CV, True, 16)
    kernels.softmax_rows_(z_CV, 16)
    return {
        "certain": float(log_sum_C[0]),
        "certain_entropy": float(entropy_C[0]),
        "certain_others": float(z_CV[0, :33].sum()),
        "even_entropy": float(entropy_C[1]),
        "steep": float(z_CV[2, -1]),
        "nan": float(log_sum_C[3]),
        "nan_softmax": float(z_CV[3, 0]),
    }


def interpret() -> dict[str, object]:
    warnings.filterwarnings(
        "error", message="Triton kernels were wanted"
    )  # a refused kernel would be PyTorch compared with itself
    served = {name: kernels_for(tile(1, 2, dtype)) is not None for name, dtype in DTYPES.items()}
    return {
        "served": {**served, "float64": kernels_for(tile(1, 2, torch.float64)) is not None},
        "errors": {
            f"{name} {rows} {size}": errors(tile(rows, size, dtype), block)
            for name, dtype in DTYPES.items()
            for rows, size, block in SHAPES
        },
        "head": {f"{tile_vocab}": numbers(torch.float32, tile_vocab) for tile_vocab in (None, 16)},
        "extremes": extremes(),
        "empty": [list(soften_rows_(tile(0, 5, torch.float32)).shape), list(log_sum_exp(torch.empty(0, 5))[0].shape)],
    }


def allowed(name: str, dtype: str) -> float:
    """Statistics are float32 whatever the tile; probabilities are rounded to the tile's precision."""
    exact = name in ("left", "beyond")
    return 0.0 if exact else ROUNDING[dtype] if name in ("softmax", "exponentials") else 5e-6


if __name__ == "__main__":
    print(json.dumps(interpret()))
