"""Which parts run, in which order, side by side or alone, and for how long at most."""

from __future__ import annotations

from dataclasses import dataclass

TOTAL_SECONDS = 470
"""Everything, the installation of wheels included: a command on the machine may take ten minutes, transfers apart."""
LEAST_SECONDS = 12
"""A part that has less left is not begun."""


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str
    module: str
    limit: int
    items: tuple[str, ...] = ()


def _part(name: str, limit: int, *items: str, module: str = "") -> Part:
    return Part(name=name, module=module or name, limit=limit, items=items)


TRAININGS = ("opd", "tropd", "tropd-clip")

GROUPS: dict[str, tuple[tuple[Part, ...], ...]] = {
    # What is timed runs alone; what is only right or wrong runs side by side.
    "cuda": (
        (
            *(_part(f"checks-{g}", 130, g, module="checks") for g in ("kernels", "generation")),
            *(_part(f"matrix-{p}", 130, p, module="matrix") for p in ("bfloat16", "float16", "float32")),
            _part("pair", 130, "long/pair", module="train"),
        ),
        (_part("heads", 70),),
        (_part("decode", 75),),
        (_part("whole", 115),),
        (_part("packed", 50),),
        (
            _part("sharded", 60),
            *(_part(f"train-nano-{m}", 150, f"nano/{m}", module="train") for m in TRAININGS),
            *(_part(f"train-long-{m}", 150, f"long/{m}", module="train") for m in TRAININGS),
        ),
    ),
    "cpu": (
        (_part("checks", 120, "kernels", "generation"), _part("matrix", 120, "bfloat16", "float16", "float32")),
        (_part("heads", 60), _part("decode", 60)),
        (_part("whole", 60), _part("packed", 60)),
        (_part("train", 60, "long/pair", "nano/tropd-clip", "long/tropd"), _part("sharded", 60)),
    ),
}
