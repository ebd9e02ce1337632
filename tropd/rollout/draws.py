"""Whether tokens were drawn from the distribution that the server claims.

    evidence for q' = sum over tokens of  log q'(token) - log q(token)      q  the claimed way to draw
                                                                            q' another way to draw them

If q is true, exp(evidence) is 1 on average at any number of tokens, so evidence of h nats comes by chance at most once
in exp(h) looks: no normal distribution is assumed, and small batches are as safe as large ones.  To first order in the
temperature the evidence is the mean of -log q less the entropy of q, which is what a person reads beside it.

Axes as in `tropd.types`, and C for the outcomes of one draw: the vocabulary, or the top-k and "another token".
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tropd.config.alarms import ENOUGH
from tropd.rollout.sampling import truncate
from tropd.types import Sampling

TEMPERATURES = (0.7, 0.9, 1.1, 1.5)
CURE = (
    "Look for sampling settings of the server that override those of the request (a generation_config.json, "
    "--override-generation-config), and for a proxy that drops fields."
)
_SLACK = 0.02
"""Probability that every alternative gives to any token, so that rounding alone cannot disprove one."""
_TIED = 0.1
"""Nats below the likeliest token within which half precision may confuse tokens."""
NEUTRAL = Sampling()
_RARE = -60.0
Numbers = Sequence[Any] | Tensor
Evidence = dict[str, float]
"""Nats, by name of the alternative."""


def others(sampling: Sampling) -> dict[str, Sampling]:
    """Alternatives to the requested way to draw."""
    if sampling.temperature == 0.0:
        return {"at temperature 1": Sampling(), "at temperature 0.5": Sampling(temperature=0.5)}
    t, top_p = sampling.temperature, sampling.top_p
    alternatives = {
        f"at temperature {factor * t:.2g}": replace(sampling, temperature=factor * t) for factor in TEMPERATURES
    }
    alternatives |= {
        f"with top_p = {share * top_p:.2g}": replace(sampling, top_p=share * top_p) for share in (0.97, 0.9)
    }
    alternatives["with top_k = 20"] = replace(sampling, top_k=min(sampling.top_k or 20, 20))
    alternatives["by taking the likeliest token"] = Sampling(temperature=0.0)
    return alternatives | ({"without truncation": Sampling(temperature=t)} if sampling.truncates else {})


@torch.no_grad()
def evidence(logprobs_NC: Tensor, drawn_N: Tensor, sampling: Sampling = NEUTRAL) -> Evidence:
    """`logprobs_NC` is the model itself, at temperature 1; `sampling` is how its tokens were to be drawn."""
    at_N1 = drawn_N[:, None]
    whole_N = logprobs_NC.gather(1, at_N1)[:, 0]
    said_N = whole_N if sampling == NEUTRAL else _under(_shaped(logprobs_NC, sampling), at_N1, whole_N)
    return {
        name: _gain(_shaped(logprobs_NC, other), at_N1, whole_N, said_N) for name, other in others(sampling).items()
    }


def evidence_of_rows(
    ids: Numbers, logprobs: Numbers, topk_ids_NK: Numbers, topk_logprobs_NK: Numbers, never: Sequence[int] = ()
) -> Evidence:
    """The same if only the likeliest tokens are known: all other tokens are one outcome with the remaining probability.
    Tokens that could `never` be among the likeliest, such as those that end a text, are left out."""
    ids_N1, ids_NK = torch.as_tensor(ids).cpu()[:, None], torch.as_tensor(topk_ids_NK).cpu()
    if not ids_NK.numel():
        return {}
    top_NK, own_N = torch.as_tensor(topk_logprobs_NK).cpu().double(), torch.as_tensor(logprobs).cpu().double()
    others_N = 1.0 - top_NK.exp().sum(-1)
    for token in never:
        top_NK = top_NK.masked_fill(ids_NK == token, _RARE)
    hit_NK, width = ids_NK == ids_N1, ids_NK.shape[1]
    places_N = torch.where(hit_NK.any(-1), hit_NK.int().argmax(-1), width)
    outside_N = places_N == width
    left_N = torch.maximum(others_N, torch.where(outside_N, own_N.exp(), 1e-9))
    # Other tokens are taken for equal ones, e times rarer than the last of the top-k: any guess is a fair bet.
    number_N1 = (left_N.log() - top_NK[:, -1] + 1.0).clamp_min(0.0)[:, None]
    each_N1 = left_N.log()[:, None] - number_N1
    said_NC = torch.cat([top_NK, left_N.log()[:, None]], 1).log_softmax(-1)
    never_N1 = torch.full_like(each_N1, -math.inf)
    shapes = {f"at temperature {t:.2g}": torch.cat([top_NK / t, each_N1 / t + number_N1], 1) for t in TEMPERATURES}
    rarer_N1 = torch.log(left_N + 0.5 * top_NK.exp().sum(-1)).unsqueeze(1)
    shapes["from outside the top-k, mostly"] = torch.cat([top_NK + math.log(0.5), rarer_N1], 1)
    shapes["from the top-k alone"] = torch.cat([top_NK, never_N1], 1)
    shapes["by taking the likeliest token"] = torch.cat([_likeliest(top_NK), never_N1], 1)
    at_N1 = places_N[:, None]
    said_N = said_NC.gather(1, at_N1)[:, 0]
    return {name: _gain(shaped_NC, at_N1, said_N, said_N) for name, shaped_NC in shapes.items()}


def total(parts: Iterable[Mapping[str, float]]) -> Evidence:
    """The sum over several groups of tokens."""
    found: Evidence = {}
    for part in parts:
        for name, nats in part.items():
            found[name] = found.get(name, 0.0) + nats
    return found


def explained(found: Mapping[str, float]) -> str | None:
    """The alternative for which there is enough evidence, if any."""
    best = max(found, key=found.__getitem__, default=None)
    return best if best is not None and found[best] > ENOUGH else None


def coincidence(texts: Sequence[Sequence[int]], logprobs: Sequence[Sequence[float]]) -> float:
    """Nats of evidence that texts of one prompt begin too much alike: -log p of the beginning that two texts share,
    less the log of the number of pairs.  By chance above h once in exp(h) looks."""
    pairs = [(a, b) for a in range(len(texts)) for b in range(a)]
    worst = 0.0
    for a, b in pairs:
        same = 0
        while same < min(len(texts[a]), len(texts[b])) and texts[a][same] == texts[b][same]:
            same += 1
        worst = max(worst, -math.fsum(logprobs[a][:same]))
    return worst - math.log(max(len(pairs), 1))


class Gathered:
    """Evidence of many steps, by probe: draws/WHO/WAY.  It adds up, and is reset when it favours the
    requested way, because a server may change its way to draw at any time."""

    def __init__(self, evidence: Mapping[str, float] | None = None) -> None:
        self.evidence = dict(evidence or {})

    def add(self, probes: Mapping[str, float]) -> None:
        for name, nats in probes.items():
            if name.count("/") == 2 and name.startswith("draws/"):
                self.evidence[name] = max(0.0, self.evidence.get(name, 0.0) + nats)

    def objection(self, who: str, enough: float) -> str | None:
        start = f"draws/{who}/"
        found = {name.removeprefix(start): nats for name, nats in self.evidence.items() if name.startswith(start)}
        how = max(found, key=found.__getitem__, default=None)
        if how is None or found[how] <= enough:
            return None
        return (
            f"what the servers of the {who} write is not drawn from the {who}'s probabilities: it looks drawn {how}, "
            f"by {found[how]:.0f} nats of evidence. {CURE}"
        )


def too_alike(probes: Mapping[str, float], enough: float) -> str | None:
    nats = probes.get("draws/alike", 0.0)
    if nats <= enough:
        return None
    return (
        f"two answers to one prompt begin so much alike that {nats:.0f} nats speak against it: the rollout servers "
        f"ignore seeds, or take the likeliest tokens. {CURE}"
    )


def _shaped(logprobs_NC: Tensor, sampling: Sampling) -> Tensor:
    if sampling.temperature == 0.0:
        return _likeliest(logprobs_NC)
    return truncate(logprobs_NC / sampling.temperature, sampling)


def _likeliest(logprobs_NC: Tensor) -> Tensor:
    edge_N1 = logprobs_NC.amax(-1, keepdim=True) - _TIED
    return torch.zeros_like(logprobs_NC).masked_fill(logprobs_NC < edge_N1, -math.inf)


def _under(shaped_NC: Tensor, at_N1: Tensor, whole_N: Tensor) -> Tensor:
    """Log-probability of the drawn tokens under these logits, with some slack."""
    shaped_N = shaped_NC.gather(1, at_N1)[:, 0] - shaped_NC.logsumexp(-1)
    return torch.logaddexp(shaped_N + math.log1p(-_SLACK), whole_N + math.log(_SLACK))


def _gain(shaped_NC: Tensor, at_N1: Tensor, whole_N: Tensor, said_N: Tensor) -> float:
    return float((_under(shaped_NC, at_N1, whole_N) - said_N).double().sum())
