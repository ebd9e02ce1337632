"""From logits to tokens: one uniform number per token, inverted through the cumulative distribution.

    token = the first v with  sum_{w <= v} p(w) > u        u = uniform(key=seed, position=t)

Temperature comes first, then top_k, top_p and min_p, each on what the one before it left (the order of transformers).
Each truncation keeps every token above an edge, so equally likely tokens stay or go together and the result does not
depend on how a sort breaks ties.

Axes: B rows of a batch, V vocabulary, C blocks of the vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tropd.errors import ConfigError
from tropd.objective.draws import uniform
from tropd.types import Sampling

STREAM = 1
"""The stream of `tropd.objective.draws` that token sampling uses."""
_BLOCK = 512


def draw_uniforms(seed: int, first: int, count: int) -> list[float]:
    """48-bit uniform numbers in [0, 1) for `count` positions: 24 bits could not reach tokens rarer than 6e-8."""
    keys, positions = torch.tensor([seed]), torch.arange(first, first + count)
    high = uniform(keys, positions, STREAM).double()
    low = uniform(keys, -2 - positions, STREAM).double()  # positions that no token has
    return (high + low * 2.0**-24).tolist()


def check_sampling(sampling: Sampling) -> None:
    """Refuse a Sampling that describes no distribution."""
    ranges = {
        "temperature": (0.0 <= sampling.temperature < math.inf, "a finite number >= 0"),
        "top_p": (0.0 < sampling.top_p <= 1.0, "in (0, 1]; 1 keeps every token"),
        "top_k": (sampling.top_k >= 0, ">= 0; 0 keeps every token"),
        "min_p": (0.0 <= sampling.min_p <= 1.0, "in [0, 1]; 0 keeps every token"),
    }
    for name, (fits, meaning) in ranges.items():
        if not fits:
            raise ConfigError(f"sampling.{name} is {getattr(sampling, name)}, but it must be {meaning}.")


def draw(logits_BV: Tensor, uniforms: list[float], sampling: Sampling) -> Tensor:
    """Draw one token per row.  Gives [3, B] float32: token id, behavior logprob, model logprob.

    Nothing is checked for NaN here: logits that are not finite show as a model logprob that is not.
    """
    if sampling.temperature == 1.0 and not sampling.truncates:
        probs_BV = torch.softmax(logits_BV, -1, dtype=torch.float32)
        ids_B = invert(probs_BV, uniforms)
        logprobs_B = _at(probs_BV, ids_B).log()
        return torch.stack([ids_B.float(), logprobs_B, logprobs_B])  # float32 holds every id below 2^24
    logits_BV = logits_BV.float()
    if sampling.temperature == 0.0:
        ids_B = logits_BV.argmax(-1)
        behavior_B = torch.zeros_like(logits_BV[:, 0])
    else:
        # Less the maximum first: a small temperature would overflow otherwise.
        scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature
        probs_BV = truncate(scaled_BV, sampling).softmax(-1)
        ids_B = invert(probs_BV, uniforms)
        behavior_B = _at(probs_BV, ids_B).log()
    # Not log(softmax): a token drawn at a high temperature may underflow in the model's own distribution.
    model_B = _at(logits_BV, ids_B) - logits_BV.logsumexp(-1)
    return torch.stack([ids_B.float(), behavior_B, model_B])


def truncate(scaled_BV: Tensor, sampling: Sampling) -> Tensor:
    """Set to -inf what top_k, top_p and min_p cut away."""
    if sampling.top_k > 0:
        edge_B1 = scaled_BV.topk(min(sampling.top_k, scaled_BV.shape[1])).values[:, -1:]
        scaled_BV = scaled_BV.masked_fill(scaled_BV < edge_B1, -math.inf)
    if sampling.top_p < 1.0:
        probs_BV = scaled_BV.softmax(-1)
        scaled_BV = scaled_BV.masked_fill(probs_BV < _nucleus_edge(probs_BV, sampling.top_p), -math.inf)
    if sampling.min_p > 0.0:
        edge_B1 = scaled_BV.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scaled_BV = scaled_BV.masked_fill(scaled_BV < edge_B1, -math.inf)
    return scaled_BV


def _nucleus_edge(probs_BV: Tensor, top_p: float) -> Tensor:
    """The probability of the last token of the smallest set of likeliest tokens that holds top_p.  [B, 1]."""
    vocab_size = probs_BV.shape[1]
    # A nucleus is small as a rule, and sorting the whole vocabulary costs 40 times as much.
    width = min(256, vocab_size)
    while True:
        likeliest_BK = probs_BV.topk(width).values
        mass_BK = _precise(likeliest_BK).cumsum(-1)
        if width == vocab_size or bool((mass_BK[:, -1] >= top_p).all()):
            break
        width = min(8 * width, vocab_size)
    last_B1 = (mass_BK < top_p).sum(-1, keepdim=True).clamp(max=width - 1)
    return likeliest_BK.gather(1, last_B1.to(probs_BV.device))


def invert(probs_BV: Tensor, uniforms: list[float]) -> Tensor:
    """The token that each uniform number falls on.  Weights need not sum to one; one of weight zero is never drawn.

    Two levels, first which block of the vocabulary and then which token of it, both summed in float64: a float32
    running sum over a large vocabulary loses the tokens rarer than its rounding.
    """
    vocab_size = probs_BV.shape[1]
    block = min(_BLOCK, vocab_size)
    whole = vocab_size // block
    blocks_BC = torch.cat(
        [
            probs_BV[:, : whole * block].unflatten(-1, (whole, block)).sum(-1),
            probs_BV[:, whole * block :].sum(-1, keepdim=True),
        ],
        dim=-1,
    )
    blocks_BC = _precise(blocks_BC)
    uniforms_B1 = torch.tensor(uniforms, dtype=blocks_BC.dtype, device=blocks_BC.device)[:, None]
    block_B1, rest_B1 = _invert_sums(blocks_BC.cumsum(-1), uniforms_B1)

    ids_BK = block_B1.to(probs_BV.device) * block + torch.arange(block, device=probs_BV.device)
    inside_BK = probs_BV.gather(1, ids_BK.clamp(max=vocab_size - 1)).masked_fill(ids_BK >= vocab_size, 0.0)
    offset_B1, _ = _invert_sums(_precise(inside_BK).cumsum(-1), rest_B1)
    # Only logits that are not finite could lead past the vocabulary, and they are refused by whoever reads the result.
    return (block_B1 * block + offset_B1).to(probs_BV.device)[:, 0].clamp(max=vocab_size - 1)


def _invert_sums(sums_BC: Tensor, uniforms_B1: Tensor) -> tuple[Tensor, Tensor]:
    """The first entry whose running sum exceeds u * total, and how far into it u falls, in [0, 1]."""
    total_B1 = sums_BC[:, -1:]
    below_total_B1 = torch.nextafter(total_B1, torch.zeros_like(total_B1))
    target_B1 = torch.minimum(uniforms_B1 * total_B1, below_total_B1)
    index_B1 = torch.searchsorted(sums_BC, target_B1, right=True).clamp(max=sums_BC.shape[1] - 1)
    before_B1 = torch.where(index_B1 > 0, sums_BC.gather(1, (index_B1 - 1).clamp(min=0)), 0.0)
    return index_B1, (target_B1 - before_B1) / (sums_BC.gather(1, index_B1) - before_B1)


def _precise(x: Tensor) -> Tensor:
    """float64, on the CPU where the device has none (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _at(x_BV: Tensor, ids_B: Tensor) -> Tensor:
    return x_BV.gather(1, ids_B[:, None])[:, 0]
