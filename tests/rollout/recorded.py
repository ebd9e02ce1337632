"""A CUDA graph's part played on a CPU: operations are done again, on the same addresses and numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tropd.rollout.graphs import Recording


class Operations(TorchDispatchMode):
    """Every operation that runs, with the tensors that it read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.done.append((func, args, kwargs or {}, out))
        return out

    def again(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, out in self.done:
                anew = func(*args, **kwargs)
                for old, new in zip(_tensors(out), _tensors(anew), strict=True):
                    if old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def _tensors(x: Any) -> list[Tensor]:
    return [t for t in (x if isinstance(x, tuple | list) else [x]) if isinstance(t, Tensor)]


def record(run: Callable[[], Tensor]) -> Recording:
    with Operations() as operations:
        logits_RV = run()
    return Recording(operations.again, logits_RV)
