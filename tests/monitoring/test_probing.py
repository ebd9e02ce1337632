"""Probes beside tropd's own: sums over sums, in their turn, and nothing changed by them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from tests.tiny import tiny_model
from tropd.config.stages import OptimizerConfig
from tropd.distributed.ranks import ALONE
from tropd.errors import ConfigError
from tropd.model.optimizer import Optimizer
from tropd.monitoring.geometry import Geometry
from tropd.monitoring.probe import Numbers, Probe, Weight
from tropd.monitoring.probing import Probing


def update_with(probe: Probe, dtype: torch.dtype = torch.bfloat16, rate: float = 1e-5) -> dict[str, float]:
    """What a probe says of one update."""
    model = tiny_model().to(dtype)
    optimizer = Optimizer(model, OptimizerConfig(learning_rate=rate), 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    probing = Probing([probe], 0)
    optimizer.watch = probing.update
    optimizer.step()
    return probing.result(ALONE)


def test_the_share_of_weights_that_an_update_leaves_in_bfloat16_is_counted() -> None:
    model, other = tiny_model().bfloat16(), tiny_model().bfloat16()
    optimizer = Optimizer(other, OptimizerConfig(learning_rate=1e-4), 1)
    generator = torch.Generator().manual_seed(0)
    for parameter in other.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
    optimizer.step()
    pairs = [(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)]
    expected = sum(int((a == b).sum()) for a, b in pairs) / sum(a.numel() for a, _ in pairs)
    found = update_with(Geometry(), rate=1e-4)
    assert 0.1 < expected < 0.95 and found["geometry/unchanged_bf16"] == pytest.approx(expected, abs=1e-12)
    estimated = update_with(Geometry(entries=300), rate=1e-4)
    assert estimated["geometry/unchanged_bf16"] == pytest.approx(expected, abs=0.05)
    assert estimated["geometry/moved"] == pytest.approx(found["geometry/moved"], rel=0.2)


def test_a_smaller_learning_rate_leaves_more_weights_and_none_leaves_all() -> None:
    shares = [update_with(Geometry(), rate=rate)["geometry/unchanged_bf16"] for rate in (1e-3, 1e-5, 1e-12)]
    assert shares[0] < shares[1] < shares[2] == 1.0


class Told(Probe):
    """Says what it is told to."""

    def __init__(self, numbers: object) -> None:
        self.numbers = numbers
        self.norms: list[float] = []

    def before_update(self, weights: Mapping[str, Weight]) -> Numbers:
        self.norms = [float(w.gradient.norm()) for w in weights.values() if w.gradient is not None]
        torch.rand(3)
        return self.numbers  # type: ignore[return-value]


def test_numbers_are_sums_over_sums_and_a_weight_of_nothing_says_nothing() -> None:
    probe = Told({"mean": (3, 4), "none": (1, 0)})
    probe.name = "told"
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    probing = Probing([probe], 0)
    for _ in range(2):
        with probing.update({}):
            probe.numbers = {"mean": (2, 1)}
    assert probing.result(ALONE) == {"told/mean": (3 + 2) / (4 + 1)}
    assert torch.equal(torch.random.get_rng_state(), before), "a probe that draws changes no draws of the run"
    update_with(probe)
    assert all(norm > 0 for norm in probe.norms)


def test_a_probe_runs_in_its_turn() -> None:
    probe = Told({})
    probe.every = 3
    assert [bool(Probing([probe], step).probes) for step in range(5)] == [True, False, False, True, False]


@pytest.mark.parametrize("numbers", [None, 3.0, {"mean": 1.0}, {"mean": (1, "x")}])
def test_a_probe_that_gives_no_numbers_is_told(numbers: object) -> None:
    with pytest.raises(ConfigError, match="gives no numbers: .* Give a table of names with a total and a weight each"):
        update_with(Told(numbers))
