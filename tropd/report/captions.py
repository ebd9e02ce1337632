"""Sentences about columns of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

Format = Literal["number", "share", "nats", "tokens", "seconds"]


def say(x: float, kind: Format) -> str:
    """A number, formatted for reading."""
    text = f"{x:.3g}"
    if kind == "share":
        text = f"{100 * x:.3g} %"
    elif kind == "seconds":
        text = f"{x:.3g} s"
    elif kind == "tokens" and abs(x) >= 100:
        text = f"{x:,.0f}"
    return text.replace("-", "−", 1) if x < 0 else text


def say_change(label: str, steps: Sequence[int], column: np.ndarray, kind: Format) -> str:
    """First and last number, and the extreme between them where it is beyond both.  Infinite ones are counted."""
    name = label[:1].upper() + label[1:]
    finite = np.isfinite(column)
    if not finite.any():
        return f"{name}: no finite number."
    shown = column[finite]
    where = np.asarray(steps)[finite]
    first, last = float(shown[0]), float(shown[-1])
    if len(shown) == 1:
        text = f"{name}: {say(first, kind)}"
    elif say(first, kind) == say(last, kind):
        text = f"{name}: {say(first, kind)} at both ends"
    else:
        text = f"{name}: from {say(first, kind)} to {say(last, kind)}"
    extremes = []
    for which, word in ((int(shown.argmin()), "least"), (int(shown.argmax()), "most")):
        x = say(float(shown[which]), kind)
        if x not in (say(first, kind), say(last, kind)):
            extremes.append(f"{word} {x} at step {where[which]:,}")
    infinite = int(np.isinf(column).sum())
    broken = [f"infinite at {infinite:,} {'step' if infinite == 1 else 'steps'}"] if infinite else []
    return "; ".join([text, *extremes, *broken]) + "."


def say_range(columns: Mapping[str, np.ndarray], kind: Format) -> str:
    """Where the runs ended."""
    ends = {
        name: float(column[np.isfinite(column)][-1]) for name, column in columns.items() if np.isfinite(column).any()
    }
    if not ends:
        return "No run has a finite number."
    low, high = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    if len(ends) == 1 or say(ends[low], kind) == say(ends[high], kind):
        return f"Last: {say(ends[high], kind)}" + (" in every run." if len(ends) > 1 else f" ({high}).")
    return f"Last: from {say(ends[low], kind)} ({low}) to {say(ends[high], kind)} ({high})."
