"""The Triton kernels compute what PyTorch computes: under the interpreter here, compiled in `tests/gpu`."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.model.kernel_cases import DTYPES, SHAPES, allowed, numbers
from tropd.model.fused import kernels_for
from tropd.model.products import add_product_, sums_wide


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict]:
    pytest.importorskip("triton")
    here = Path(__file__).parents[2]
    command = [sys.executable, "-m", "tests.model.kernel_cases"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=here, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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

    from tropd.model import kernels

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
    from tropd.model import kernels

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
