"""From logits to tokens: one uniform number per token, inverted through the cumulative distribution.

    token = the first v with  sum_{w <= v} p(w) > u        u = uniform(key=seed, position=t)

Temperature comes first, then top_k, top_p and min_p, each applied to the result of the one before (as in transformers).
Each truncation keeps every token above an edge, so equally likely tokens stay or go together and the result does not
depend on how a sort breaks ties.

Axes: B rows of a batch, V vocabulary, C blocks of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import DataError
from tropd.objective.draws import uniform
from tropd.types import Request, Sampling

STREAM, OVERWRITING = 1, 3
"""The streams of `tropd.objective.draws` for token sampling, and for tokens that a teacher writes in their place."""
_BLOCK = 512
_BELOW_ONE = 1 - 2.0**-48
_IN_CACHE = 2**20
"""Logits that are processed at once on a CPU: 4 MiB of float32."""


def draw_uniforms(seed: int, first: int, count: int) -> list[float]:
    """48-bit uniform numbers in [0, 1) for `count` positions: 24 bits could not reach tokens rarer than 6e-8."""
    return draw_uniform_rows([seed], [first], count)[0]


def draw_uniform_rows(
    seeds: Sequence[int], firsts: Sequence[int], count: int, stream: int = STREAM
) -> list[list[float]]:
    """`draw_uniforms` for several seeds at once, each from its own first position on."""
    keys_B1, first_B1 = torch.tensor(seeds)[:, None], torch.tensor(firsts)[:, None]
    positions_BT = first_B1 + torch.arange(count)
    high_BT = uniform(keys_B1, positions_BT, stream).double()
    low_BT = uniform(keys_B1, -2 - positions_BT, stream).double()  # positions that no token has
    return (high_BT + low_BT * 2.0**-24).tolist()


def check_request(request: Request, index: int) -> None:
    """Refuse a request that no engine can carry out."""
    if not request.token_ids:
        raise DataError(f"request {index} has no tokens to continue.  Give it at least a begin-of-text token.")
    if request.max_new_tokens < 1:
        raise DataError(f"request {index} asks for max_new_tokens = {request.max_new_tokens}; it must be at least 1.")


def draw(logits_BV: Tensor, uniforms: list[float], sampling: Sampling) -> Tensor:
    """Draw one token per row.  Gives [3, B] float32: token id, behavior logprob, model logprob.

    On a CPU some rows at a time: their probabilities stay in cache and need no memory of the size of the logits.
    Nothing is checked for NaN here: logits that are not finite show as a model logprob that is not.
    """
    step = max(1, _IN_CACHE // logits_BV.shape[1]) if logits_BV.device.type == "cpu" else len(logits_BV)
    neutral = sampling.temperature == 1.0 and not sampling.truncates
    scratch_BV = torch.empty_like(logits_BV[:step], dtype=torch.float32, memory_format=torch.contiguous_format)
    drawn = []
    if step < len(logits_BV):
        TAKEN.add(FastPath.DRAWS_IN_PARTS)
    for start in range(0, len(logits_BV), step):
        part_BV, part_uniforms = logits_BV[start : start + step], uniforms[start : start + step]
        probs_BV = scratch_BV[: len(part_BV)]
        if neutral:
            torch.softmax(part_BV, -1, dtype=torch.float32, out=probs_BV)
            ids_B = invert(probs_BV, part_uniforms)
            behavior_B = model_B = _at(probs_BV, ids_B).log()
        else:
            ids_B, behavior_B, model_B = _draw_shaped(part_BV.float(), part_uniforms, sampling, probs_BV)
        drawn.append(torch.stack([ids_B.float(), behavior_B, model_B]))  # float32 holds every id below 2^24
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)


def _draw_shaped(
    logits_BV: Tensor, uniforms: list[float], sampling: Sampling, probs_BV: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, behavior and model logprobs for a distribution changed by temperature or truncation."""
    highest_B1 = logits_BV.amax(-1, keepdim=True)
    if sampling.temperature == 0.0:
        ids_B = logits_BV.argmax(-1)
        behavior_B = torch.zeros_like(logits_BV[:, 0])
    else:
        # Less the maximum first: a small temperature would overflow otherwise.
        scaled_BV = truncate((logits_BV - highest_B1) / sampling.temperature, sampling)
        torch.softmax(scaled_BV, -1, out=probs_BV)
        ids_B = invert(probs_BV, uniforms)
        behavior_B = _at(probs_BV, ids_B).log()
    # Not log(softmax): a token drawn at a high temperature may underflow in the model's own distribution.
    # log sum exp z = max z - log max p, since max p is at least 1/V: softmax is much faster than logsumexp on a CPU.
    torch.softmax(logits_BV, -1, out=probs_BV)
    log_sum_B = highest_B1[:, 0] - probs_BV.amax(-1).log()
    return ids_B, behavior_B, _at(logits_BV, ids_B) - log_sum_B


def truncate(scaled_BV: Tensor, sampling: Sampling) -> Tensor:
    """Set the tokens that top_k, top_p and min_p exclude to -inf."""
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

    Two levels unless the vocabulary is small, first which block of it and then which token, both summed in float64: a
    float32 running sum over a large vocabulary loses the tokens rarer than its rounding.
    """
    vocab_size = probs_BV.shape[1]
    if vocab_size <= _BLOCK:
        sums_BV = _running_sums(probs_BV)
        uniforms_B1 = torch.tensor(uniforms, dtype=sums_BV.dtype, device=sums_BV.device)[:, None]
        return _first_above(sums_BV, uniforms_B1 * sums_BV[:, -1:]).to(probs_BV.device)[:, 0]
    block, whole = _BLOCK, vocab_size // _BLOCK
    blocks_BC = probs_BV[:, : whole * block].unflatten(-1, (whole, block)).sum(-1)
    if whole * block < vocab_size:
        blocks_BC = torch.cat([blocks_BC, probs_BV[:, whole * block :].sum(-1, keepdim=True)], dim=-1)
    sums_BC = _running_sums(blocks_BC)
    uniforms_B1 = torch.tensor(uniforms, dtype=sums_BC.dtype, device=sums_BC.device)[:, None]
    target_B1 = uniforms_B1 * sums_BC[:, -1:]
    block_B1 = _first_above(sums_BC, target_B1)
    before_B1 = sums_BC.gather(1, block_B1)
    # How far into its block u falls; rounding must not take it to the end, where the last token may weigh nothing.
    rest_B1 = ((target_B1 - before_B1) / (sums_BC.gather(1, block_B1 + 1) - before_B1)).clamp(max=_BELOW_ONE)

    ids_BK = block_B1.to(probs_BV.device) * block + torch.arange(block, device=probs_BV.device)
    if whole * block < vocab_size:
        inside_BK = probs_BV.gather(1, ids_BK.clamp(max=vocab_size - 1)).masked_fill(ids_BK >= vocab_size, 0.0)
    else:
        inside_BK = probs_BV.gather(1, ids_BK)
    sums_BK = _running_sums(inside_BK)
    offset_B1 = _first_above(sums_BK, rest_B1 * sums_BK[:, -1:])
    # Only logits that are not finite could lead past the vocabulary, and the caller refuses them.
    return (block_B1 * block + offset_B1).to(probs_BV.device)[:, 0].clamp(max=vocab_size - 1)


def _running_sums(x_BC: Tensor) -> Tensor:
    """[B, C + 1] in float64: entry c is the sum of the first c."""
    precise_BC = _precise(x_BC)
    sums_BC = precise_BC.new_zeros(len(x_BC), x_BC.shape[1] + 1)
    torch.cumsum(precise_BC, -1, out=sums_BC[:, 1:])
    return sums_BC


def _first_above(sums_BC: Tensor, target_B1: Tensor) -> Tensor:
    """The first entry whose running sum exceeds the target."""
    return (torch.searchsorted(sums_BC, target_B1, right=True) - 1).clamp(max=sums_BC.shape[1] - 2)


def _precise(x: Tensor) -> Tensor:
    """The tensor in float64; on the CPU if the device has no float64 (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _at(x_BV: Tensor, ids_B: Tensor) -> Tensor:
    return x_BV.gather(1, ids_B[:, None])[:, 0]
