"""Random numbers that belong to a token, not to a batch.

A counter-based generator: the number is a hash of (key of the rollout, position, stream), so the same token gets the
same draw whatever the batch, micro-batch, rank or resume.  The hash is the finaliser of SplitMix64 (Steele, Lea and
Flood, 2014), applied once per input, in int64 arithmetic that wraps: the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser.  Shifts are made logical: torch shifts int64 arithmetically."""
    x = (x ^ ((x >> 30) & 0x3_FFFF_FFFF)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    x = (x ^ ((x >> 27) & 0x1F_FFFF_FFFF)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return x ^ ((x >> 31) & 0x1_FFFF_FFFF)


_GOLDEN = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15: SplitMix64's increment


def uniform(keys: Tensor, positions: Tensor, stream: int = 0) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, so that float32 holds them exactly on every device."""
    keys, positions = keys.to(torch.int64), positions.to(torch.int64)
    offset = (stream * _GOLDEN + 2**63) % 2**64 - 2**63  # wrapped as int64 arithmetic wraps
    state = _mix(_mix(_mix(keys + _GOLDEN) ^ (positions + 1)) + offset)
    return ((state >> 40) & 0xFF_FFFF).to(torch.float32) * 2.0**-24
