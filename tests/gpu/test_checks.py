"""On a GPU: compiled kernels, products with float32 sums, recorded steps of generation.

The same without a GPU, as far as there is something to run, is part of `test_gpu_check.py`.
"""

from __future__ import annotations

import pytest

from tests.gpu.checks import cases

CASES = dict(cases("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_a_gpu(name):
    CASES[name]()
