"""The probes that a run file asks for: names, knobs, and how often each of them runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tropd.base.names import Own
from tropd.base.reading import shortened
from tropd.errors import ConfigError

PROBES = {
    "change": "tropd.monitoring.change:Change",
    "geometry": "tropd.monitoring.geometry:Geometry",
    "rock": "tropd.monitoring.rock:Rock",
    "trained": "tropd.monitoring.trained:Trained",
}
"""tropd's own, by the names that a run file has for them."""


def read_probes(value: Any) -> tuple[Own, ...]:
    """From a list of names and tables.  Imports nothing."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"probes is {shortened(repr(value))}, but it is a list of names, such as ['geometry'].")
    probes = tuple(one if isinstance(one, Own) else Own.read(one, "probe", "a probe", PROBES) for one in value)
    for probe in probes:
        every = probe.knobs.get("every", 1)
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ConfigError(
                f"probe {shortened(probe.name)!r} has every = {every!r}. Give a whole number of steps, 1 or more."
            )
    return probes
