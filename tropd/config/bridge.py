"""How a teacher with another tokenizer reads: `[teacher.bridge]` in a run file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from tropd.base.ranges import Count, Range, Ranged


@dataclass(frozen=True, kw_only=True)
class BridgeConfig(Ranged):
    """The teacher has a tokenizer of its own: it reads the student's text, and credit comes back by chunks."""

    section = "bridge"

    credit: Literal["proportional", "additive", "uniform"] = "proportional"
    """How a chunk's sum is shared among the student's tokens: by the student's own surprise (paper), so that all differ
    from the student by the same, or equally."""
    longest: Count = 6
    """Longer chunks, in tokens of either side, teach nothing (paper: 6). At least 1."""
    most_nats: Annotated[float, Range(above=0, unbounded=True)] = 10.0
    """By how much teacher and student may differ at a token (paper: 10). Above 0; inf bounds nothing."""
    special: dict[str, str] = field(default_factory=dict)
    """Special tokens of the student and what the teacher calls them, where the names differ: { "<think>" = "[THINK]" }.
    The token that ends a turn needs no entry."""
