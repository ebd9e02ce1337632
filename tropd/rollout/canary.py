"""The canary for servers that hold the student: do they compute with the weights that the trainer gave them?

    trainer   log pi(t_1..t_n) and the distribution of the token after them, from a forward pass here
    server    the same text scored, and one token written after it (which alone reads the prefix cache)

The tokens are arbitrary, because no model has learnt them: their log-probabilities move with every weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tropd.errors import EngineOutOfSync
from tropd.rollout.transformers import generating
from tropd.servers.canary import Canary, shown
from tropd.types import Completion, key_of

_LONGEST = 160
"""More than a block of any prefix cache."""
_SINGLE = 5.0
"""A single number may differ by this many times the allowed average."""
_MOVED = 1e-4
"""Nats by which the trainer's numbers must have moved before a server's are expected to move."""


@dataclass(frozen=True, kw_only=True)
class Expected:
    """The text under the trainer's weights."""

    canary: Canary
    after_V: Tensor
    """Log-probabilities of the token after the text."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The text under a server's weights."""

    logprobs: list[float]
    written: Completion
    """One token after the text, with its log-probability."""


def known_text(vocab_size: int, longest: int) -> tuple[int, ...]:
    """The same tokens in every run; leaves room for two more."""
    return tuple(key_of(0, "canary", place) % vocab_size for place in range(max(2, min(_LONGEST, longest - 2))))


def expect(model: Any, ids: Sequence[int], vocab_size: int) -> Expected:
    device = next(model.parameters()).device
    with generating(model):
        logits_TV = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0, :, :vocab_size]
        logprobs_TV = logits_TV.float().log_softmax(-1)
    own_T = logprobs_TV[:-1].gather(1, torch.tensor(ids[1:], device=device)[:, None])[:, 0]
    return Expected(canary=Canary(ids=tuple(ids), logprobs=tuple(own_T.tolist())), after_V=logprobs_TV[-1].cpu())


def compare(
    url: str, expected: Expected, found: Found, nats: float, whose: str = "student", knob: str = "rollout.sync_nats"
) -> None:
    """Refuse a server that computes with other weights than the trainer, with both numbers; `knob` is the setting that
    holds `nats`."""
    gaps = expected.canary.gaps(found.logprobs)
    mean = sum(gaps) / len(gaps)
    (token,), (there,) = found.written.token_ids, found.written.behavior_logprobs
    here = float(expected.after_V[token])
    if mean <= nats and abs(here - there) <= _SINGLE * nats:
        return
    raise EngineOutOfSync(
        f"{url} does not compute with the {whose}'s weights. A known text of {len(gaps) + 1} tokens has the "
        f"log-probabilities\n  trainer {shown(expected.canary.logprobs)}\n  server  {shown(found.logprobs)}\n"
        f"{mean:.3g} nats apart on average, {max(gaps):.3g} at most; the token written after it {here:.4f} here and "
        f"{there:.4f} there "
        f"({knob} = {nats:g}). "
    )


def compare_moves(url: str, before: tuple[Expected, Found], now: tuple[Expected, Found]) -> None:
    """Refuse a server whose numbers stand still to the last digit while the trainer's have moved."""
    moved = max(before[0].canary.gaps(now[0].canary.logprobs))
    if moved > _MOVED and before[1].logprobs == now[1].logprobs:
        raise EngineOutOfSync(
            f"{url} took the new weights without a change: a known text has the log-probabilities\n"
            f"  trainer {shown(before[0].canary.logprobs)}, now {shown(now[0].canary.logprobs)}\n"
            f"  server  {shown(before[1].logprobs)}, before and after.\n"
        )
