"""Devices: numbers from their makers, or measured on this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from tropd.errors import ConfigError
from tropd.model.loading import choose_device, choose_dtype, free_memory

REACHED = {"score": 0.5, "train": 0.35, "write": 0.5}
"""Share of a GPU's peak that each kind of work reaches: assumed, not measured with tropd."""
REACHED_HERE = {"score": 0.7, "train": 0.65, "write": 1.0}
"""The same shares on a CPU: measured by benchmarks/plan.py with one thread."""
DISK = 2e9
"""Assumed bytes per second for writing and reading a run's folder."""


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory: float
    """Bytes."""
    operations: float
    """Per second, dense, in bfloat16 (float32 on a CPU)."""
    bandwidth: float
    """Bytes of memory per second."""
    launch: float = 5e-6
    """Seconds between operations that Python starts: nearly all of a tiny model's step."""
    token: float = 2e-6
    """Seconds that this process spends on each token of any model: lists, masks, records."""
    link: float = float("inf")
    """Bytes per second, in each direction, to the other devices of its machine."""
    disk: float = DISK
    kind: str = "cuda"
    """Its name in torch."""
    reached: Mapping[str, float] = field(default_factory=lambda: REACHED)


# From the makers' data sheets: SXM modules, without sparsity.
DEVICES = {
    "a100": Device(name="a100", memory=80e9, operations=312e12, bandwidth=2.0e12, link=300e9),
    "h100": Device(name="h100", memory=80e9, operations=989e12, bandwidth=3.35e12, link=450e9),
    "h200": Device(name="h200", memory=141e9, operations=989e12, bandwidth=4.8e12, link=450e9),
    "l40s": Device(name="l40s", memory=48e9, operations=362e12, bandwidth=0.864e12, link=32e9),
    "rtx4090": Device(name="rtx4090", memory=24e9, operations=165e12, bandwidth=1.008e12, link=32e9),
}


def read_cluster(text: str) -> tuple[Device, int]:
    """`8xh100`, `h200`, or `here`: this machine, measured."""
    if text == "here":
        return measure_here(), 1
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)", text.lower())
    if found is None or found.group(2) not in DEVICES or int(found.group(1) or 1) == 0:
        raise ConfigError(
            f"--cluster {text!r} is not understood. Give a number and a device, such as 8xh100; known: "
            f"{', '.join(DEVICES)}; or `here` for this machine."
        )
    return DEVICES[found.group(2)], int(found.group(1) or 1)


def measure_here(seconds: float = 0.3) -> Device:
    """Matrix products and copies on this machine's own device."""
    where = choose_device("auto")
    dtype = choose_dtype("auto", where)
    a, b = (torch.randn(1024, 1024, device=where).to(dtype) for _ in range(2))
    large = torch.empty(1 << 26, dtype=torch.uint8, device=where)
    products = _rate(lambda: a @ b, seconds, where)
    copies = _rate(lambda: large.clone(), seconds, where)
    row, square = torch.randn(8, 32, device=where), torch.randn(32, 32, device=where)
    own = {}
    if where.type == "cpu":  # elsewhere an operation is started without waiting for the one before
        launch = 1 / _rate(lambda: row @ square, seconds / 3, where)
        own = {"launch": launch, "token": 4 * launch}  # 4: measured with models of 1 to 8 layers of width 32
    return Device(
        name=f"this {where.type}",
        memory=float(free_memory(where) or 0),
        operations=products * 2 * 1024**3,
        bandwidth=copies * 2 * large.numel(),
        kind=where.type,
        reached=REACHED_HERE if where.type == "cpu" else REACHED,
        **own,
    )


def _rate(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Repetitions per second."""
    work()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or count < 3:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count / passed
