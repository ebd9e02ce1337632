"""The probe "trained": how much of what was written some term learns from."""

from __future__ import annotations

import torch

from tropd.monitoring.probe import Numbers, Probe, Sight


class Trained(Probe):
    """The share of the response tokens that some term weighs, whoever wrote them."""

    name = "trained"

    def look(self, sight: Sight) -> Numbers:
        written = sum(len(rollout.response_ids) for rollout in sight.rollouts)
        weighed = [weight_N != 0 for weight_N in sight.plan.weights.values()]
        trained = int(torch.stack(weighed).any(0).sum()) if weighed else 0
        return {"share": (trained, written)}
