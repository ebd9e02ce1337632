"""The probes that a run file names: made before the run, asked in each step, added up over its parts and processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from tropd.base.names import Own, reason, shown
from tropd.config.probes import PROBES
from tropd.config.run import Run
from tropd.distributed.ranks import Ranks
from tropd.errors import ConfigError, TropdError
from tropd.model.optimizer import local
from tropd.monitoring.probe import Numbers, Probe, Sight, Weight
from tropd.monitoring.probes import HIGHS, LOWS, QUANTILES, mean_names

TAKEN = {name.split("/")[0] for name in (*mean_names(1), *LOWS, *HIGHS, *QUANTILES)}
TAKEN |= {"draws", "follow", "gradient", "readers", "reward", "rollout", "teachers"}
"""What the numbers of every run are called."""


def open_probes(run: Run) -> tuple[Probe, ...]:
    """Make the probes of a run: this runs the code that their names stand for."""
    probes: dict[str, Probe] = {}
    for named in run.probes:
        probe, said = _make(named), f"probe '{shown(named.name)}'"
        if missing := probe.needs & ~run.method.needs:
            names = ", ".join(str(need.name).lower() for need in missing)
            raise ConfigError(
                f"{said} needs {names}, which method {shown(run.method.name)} does not read. Leave the probe out."
            )
        if probe.name in probes or probe.name in TAKEN or "/" in probe.name:
            raise ConfigError(f"{said} is called {probe.name!r}, as other numbers are. Give its class another `name`.")
        probes[probe.name] = probe
    return tuple(probes.values())


def _make(named: Own) -> Probe:
    knobs = {name: value for name, value in named.knobs.items() if name != "every"}
    probe = Own(name=PROBES.get(named.name, named.name), knobs=knobs).make(Probe, "probe")
    probe.every = named.knobs.get("every", probe.every)
    probe.name = probe.name or type(probe).__name__.lower()
    return probe


class Probing:
    """The probes of one step."""

    def __init__(self, probes: Sequence[Probe], step: int) -> None:
        self.probes = [probe for probe in probes if step % probe.every == 0]
        for probe in self.probes:
            probe.step = step
        self.sums: dict[str, tuple[float, float]] = {}

    def look(self, sight: Sight) -> None:
        for probe in self.probes:
            self._ask(probe, lambda probe=probe: probe.look(sight))

    @contextmanager
    def update(self, masters: Mapping[str, Tensor]) -> Iterator[None]:
        """Around an update."""
        for probe in self.probes:
            self._ask(probe, lambda probe=probe: probe.before_update(_weights(masters)))
        yield
        for probe in self.probes:
            self._ask(probe, lambda probe=probe: probe.after_update(_weights(masters)))

    def result(self, world: Ranks) -> dict[str, float]:
        """The numbers of all processes; each of them must call this."""
        whole: dict[str, tuple[float, float]] = {}
        for part in world.gather_json(self.sums) if self.probes else ():
            for name, pair in part.items():
                whole[name] = _sum(whole.get(name), pair)
        return {name: total / weight for name, (total, weight) in whole.items() if weight}

    def _ask(self, probe: Probe, call: Callable[[], Numbers]) -> None:
        devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                numbers = {name: (float(total), float(weight)) for name, (total, weight) in call().items()}
        except TropdError:
            raise
        except Exception as problem:
            raise ConfigError(
                f"probe {probe.name!r} gives no numbers: {reason(problem)}. Give a table of names with a total and a "
                "weight each, such as {'mean': (12.5, 4)}."
            ) from problem
        for name, pair in numbers.items():
            key = f"{probe.name}/{name}"
            self.sums[key] = _sum(self.sums.get(key), pair)


def _sum(a: tuple[float, float] | None, b: Sequence[float]) -> tuple[float, float]:
    return (b[0], b[1]) if a is None else (a[0] + b[0], a[1] + b[1])


def _weights(masters: Mapping[str, Tensor]) -> dict[str, Weight]:
    return {
        name: Weight(value=local(x.detach()), gradient=None if x.grad is None else local(x.grad), laid=x.detach())
        for name, x in masters.items()
    }
