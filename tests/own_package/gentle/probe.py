"""How sure the student is of what it wrote, and how large its gradient is."""

from __future__ import annotations

from collections.abc import Mapping

from tropd import Probe
from tropd.monitoring.probe import Numbers, Sight, Weight
from tropd.objective.evidence import Needs
from tropd.types import Author


class Sure(Probe):
    """The share of the student's tokens above a probability, and the mean size of a gradient's entries."""

    needs = Needs.SAMPLED

    def __init__(self, above: float = 0.5) -> None:
        self.above = above

    def look(self, sight: Sight) -> Numbers:
        own_N = sight.tokens.authors_N == Author.STUDENT
        sure_N = sight.view.logprobs_N.exp() > self.above
        return {"share": (int((sure_N & own_N).sum()), int(own_N.sum()))}

    def before_update(self, weights: Mapping[str, Weight]) -> Numbers:
        gradients = [weight.gradient for weight in weights.values() if weight.gradient is not None]
        return {"gradient": (sum(float(x.abs().sum()) for x in gradients), sum(x.numel() for x in gradients))}
