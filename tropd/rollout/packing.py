"""Weights packed for products with a few rows, as in every step of generation.

The BLAS library lays a matrix W [out, in] out anew for every product, which costs more than a product with a few rows
itself.  oneDNN lays it out once.  Only on the CPU; adapters, quantised and very small matrices stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tropd.base.fast_paths import TAKEN, FastPath

_MIN_WEIGHTS = 2**20
"""Models with fewer weights fit into the processor's caches, where packing hardly matters."""
_MIN_MATRIX = 2**15
"""Below it, calling oneDNN costs more than the product."""
_MOST_FROZEN = 2**30
"""Bytes.  A copy of trained weights fits where their gradients will be; one of frozen weights raises the peak."""
_TYPICAL_ROWS = 16


class Product:
    """h -> [W_1; W_2; ...] h + b: several linear modules on the same input as one product of packed copies."""

    def __init__(self, modules: Sequence[Any], pack: bool = True) -> None:
        self.modules = list(modules)
        self.joined = all(is_plain(m) for m in self.modules) and len({m.bias is None for m in self.modules}) == 1
        if not self.joined:
            return
        single, first = len(self.modules) == 1, self.modules[0]
        self.weight = first.weight.detach() if single else torch.cat([m.weight.detach() for m in self.modules])
        self.bias = None if first.bias is None else torch.cat([m.bias.detach() for m in self.modules])
        self.is_packed = pack and self.weight.numel() >= _MIN_MATRIX and multiplies(self.weight)
        if self.is_packed:
            TAKEN.add(FastPath.PACKED_MATRICES)
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, _TYPICAL_ROWS)

    def __call__(self, hidden: Tensor) -> Tensor:
        if not self.joined:
            return torch.cat([module(hidden) for module in self.modules], dim=-1)
        if self.is_packed:
            return torch.ops.mkldnn._linear_pointwise(hidden, self.weight, self.bias, "none", [], "")
        return nn.functional.linear(hidden, self.weight, self.bias)


@contextmanager
def packed(modules: Sequence[Any]) -> Iterator[None]:
    """Inside the block these modules use packed copies of their weights, if that pays."""
    chosen = [m for m in modules if is_plain(m) and m.weight.numel() >= _MIN_MATRIX and multiplies(m.weight)]
    try:
        for module in chosen:
            module.forward = Product([module]).__call__
        yield
    finally:
        for module in chosen:
            vars(module).pop("forward", None)


def are_large(modules: Sequence[Any]) -> bool:
    """Whether the weights exceed the processor's caches, so that packing pays."""
    return sum(module.weight.numel() for module in modules if is_plain(module)) >= _MIN_WEIGHTS


def fit_twice(modules: Sequence[Any]) -> bool:
    """Whether a second copy of the frozen weights is small enough."""
    weights = [module.weight for module in modules if is_plain(module) and not module.weight.requires_grad]
    return sum(weight.numel() * weight.element_size() for weight in weights) <= _MOST_FROZEN


def is_plain(module: Any) -> bool:
    """Whether a module is a plain matrix on the CPU with the standard product."""
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)
        and type(module.weight) is nn.Parameter
        and module.weight.device.type == "cpu"
    )


def multiplies(weight: Tensor) -> bool:
    """Whether oneDNN supports packed matrices of this type on this machine."""
    onednn: Any = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or not hasattr(onednn, "_reorder_linear_weight"):
        return False
    if weight.dtype == torch.bfloat16:
        return bool(onednn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32 and hasattr(onednn, "_linear_pointwise")
