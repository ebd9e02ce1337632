"""The Triton kernels compute what PyTorch computes: under the interpreter here, compiled where there is a GPU.

`python -m tests.student.test_kernels`, with TRITON_INTERPRET=1, prints what the interpreter finds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tropd.student.fused import kernels_for, log_sum_exp, soften_rows_
from tropd.student.head import Head
from tropd.student.lean import exponentials_
from tropd.student.one_pass import fused_loss, read_rows
from tropd.student.products import add_product_, sums_wide

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ROUNDING = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
SHAPES = [(1, 1, 16), (3, 7, 16), (5, 133, 32), (2, 64, 64), (2, 65, 64)]
"""Rows, vocabulary and block: one token, a part of a block, several blocks, exactly one, one and a token."""


def tile(rows: int, size: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    z_CV = 4 * torch.randn(rows, size, generator=torch.Generator().manual_seed(size))
    return z_CV.to(dtype).to(device)


def errors(z_CV: Tensor, block: int | None = None) -> dict[str, float]:
    """How far every kernel is from float64, in place on a view whose rows do not touch."""
    from tropd.student import kernels

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
    from tropd.student import kernels

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


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    pytest.importorskip("triton")
    here = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.student.test_kernels"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def allowed(name: str, dtype: str) -> float:
    """Statistics are float32 whatever the tile; probabilities are rounded to the tile's precision."""
    exact = name in ("left", "beyond")
    return 0.0 if exact else ROUNDING[dtype] if name in ("softmax", "exponentials") else 5e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [shape[:2] for shape in SHAPES])
def test_interpreted_kernels_are_float64_rounded(interpreted, dtype, rows, size):
    for name, error in interpreted["errors"][f"{dtype} {rows} {size}"].items():
        assert error <= allowed(name, dtype), (name, error)


@pytest.mark.parametrize("tile_vocab", [None, 16])
def test_the_head_through_the_kernels_is_the_head_without_them(interpreted, tile_vocab):
    assert kernels_for(torch.empty(1, 2)) is None
    found, plain = interpreted["head"][str(tile_vocab)], numbers(torch.float32, None)
    assert found.keys() == plain.keys()
    for name, x in plain.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(x), rtol=1e-5, atol=1e-4, msg=name)


def test_kernels_serve_every_precision_but_float64(interpreted):
    assert interpreted["served"] == {"float32": True, "bfloat16": True, "float16": True, "float64": False}


def test_extreme_rows_are_right_and_a_nan_is_never_hidden(interpreted):
    found = interpreted["extremes"]
    assert (found["certain"], found["certain_entropy"], found["certain_others"]) == (2.0, 0.0, 0.0)
    assert found["even_entropy"] == pytest.approx(math.log(40), abs=1e-5) and found["steep"] == 1.0
    assert math.isnan(found["nan"]) and math.isnan(found["nan_softmax"])


def test_no_rows_launch_nothing(interpreted):
    assert interpreted["empty"] == [[0], [0]]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", ["_softmax", "_log_sum", "_exponentials"])
def test_kernels_compile_for_nvidia_targets_without_a_device(name, capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tropd.student import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    kernel = getattr(kernels, name)
    constants = {key: value for key, value in {"ENTROPY": True, "BLOCK": 4096}.items() if key in kernel.arg_names}
    types = {"z_ptr": "*bf16", "log_sum_ptr": "*fp32", "entropy_ptr": "*fp32", "stride": "i32", "size": "i32"}
    signature = {key: "constexpr" if key in constants else types[key] for key in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    assert len(compiled.asm["cubin"]) > 0


def test_a_device_that_triton_cannot_use_is_named_and_left_to_pytorch():
    pytest.importorskip("triton")
    from tropd.student import kernels

    kernels.agree.cache_clear()
    with pytest.warns(RuntimeWarning, match="float32 on cpu, but .*PyTorch's own operations are used"):
        assert not kernels.agree(torch.device("cpu"), torch.float32)


def test_a_float32_sum_of_half_precision_products_is_rounded_once_a_product():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(8, 8, generator=g).bfloat16() for _ in range(2))
    sum_AB = torch.full((8, 8), 1000.0)
    assert not sums_wide(torch.device("cpu"), torch.bfloat16)
    for _ in range(50):
        add_product_(sum_AB, a, b)
    exact = 1000.0 + 50 * (a.double() @ b.double())
    assert float((sum_AB - exact).abs().max()) < 50 * 2**-8 * float((a.double() @ b.double()).abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 7), (5, 133), (4, 4097), (3, 151_936), (2, 262_144), (70_001, 5)])
def test_compiled_kernels_are_float64_rounded(dtype, rows, size):
    z_CV = tile(rows, size, DTYPES[dtype], "cuda")
    assert kernels_for(z_CV) is not None
    for name, error in errors(z_CV).items():
        assert error <= 2 * allowed(name, dtype), (name, error)


@pytest.mark.gpu
def test_compiled_kernels_reach_beyond_32_bits():
    rows, size = 9000, 262_144
    z_CV = torch.zeros(rows, size, dtype=torch.bfloat16, device="cuda")
    assert rows * size > 2**31
    log_sum_C = soften_rows_(z_CV)
    torch.testing.assert_close(log_sum_C.cpu(), torch.full((rows,), math.log(size)))
    assert bool((z_CV[-1] == 1 / size).all())
    exponentials_(z_CV, torch.zeros(rows, device="cuda"))
    assert bool((z_CV[-1] == 1).all())


@pytest.mark.gpu
@pytest.mark.parametrize("tile_vocab", [None, 16])
def test_the_head_on_a_gpu_is_the_head_on_a_cpu(tile_vocab):
    a, b = numbers(torch.float32, None), numbers(torch.float32, tile_vocab, "cuda")
    for name, x in a.items():
        torch.testing.assert_close(torch.tensor(b[name]), torch.tensor(x), rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_float32_sum_on_a_gpu_loses_nothing_of_half_precision_products(dtype):
    a, b = (torch.randn(64, 64, device="cuda").to(DTYPES[dtype]) for _ in range(2))
    assert sums_wide(a.device, a.dtype)
    sum_AB = torch.zeros(64, 64, device="cuda")
    add_product_(sum_AB, a, b)
    torch.testing.assert_close(sum_AB.double(), a.double() @ b.double(), rtol=1e-5, atol=1e-4)


if __name__ == "__main__":
    print(json.dumps(interpret()))
