"""Sequences one after another in a single row, each attending to itself alone: no padding, and no mask.

    row        a a a a a b b b c c c c c c c        matrix products see 15 tokens, not 3 x 7
    attention  [a a a a a] [b b b] [c c c c c c c]  one causal block for each sequence

`transformers` lets a model's attention be replaced by name; `by_span` is ours, under the name below.  It is used on
CPUs, where padding costs what tokens cost, and only by models in which a probe finds the same hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model import hf

_NAME = "tropd_spans"
_LENGTHS: ContextVar[tuple[int, ...] | None] = ContextVar("lengths", default=None)
_FOREIGN = ("softcap", "position_bias", "sliding_window", "s_aux", "cache")
_WORTH = 16
"""A rectangle is split into spans if more than a sixteenth of it would be padding."""


class NoSpans(Exception):
    """Raised by a layer whose attention spans cannot express."""


def by_span(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each span.  query [1, heads, T, D] -> [1, T, heads, D]."""
    lengths = _LENGTHS.get()
    odd = [name for name in _FOREIGN if others.get(name) is not None]
    if lengths is None or query.shape[2] != sum(lengths) or key.shape[2] != sum(lengths):
        raise NoSpans("the spans are not those of the tokens")
    if attention_mask is not None or odd or not getattr(module, "is_causal", True):
        raise NoSpans(", ".join(odd) or "a mask")
    mixed = [
        scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        ).transpose(1, 2)
        for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    ]
    return torch.cat(mixed, dim=1), None


_KNOWN = hf.register_attention(_NAME, by_span)


@contextmanager
def spans(backbone: Any, lengths: Sequence[int]) -> Iterator[None]:
    """Inside the block the backbone attends within spans of these lengths."""
    token = _LENGTHS.set(tuple(lengths))
    try:
        with hf.attending(backbone, _NAME):
            yield
    finally:
        _LENGTHS.reset(token)


def worth_it(lengths: Sequence[int]) -> bool:
    rectangle = max(lengths) * len(lengths)
    worth = (rectangle - sum(lengths)) * _WORTH > rectangle
    if worth:
        TAKEN.add(FastPath.SPANS)
    return worth


def attends_by_span(backbone: Any, same: Callable[[], bool]) -> bool:
    """Whether this model can: plain causal attention in every layer, and `same` confirms it on a probe."""
    config: Any = getattr(backbone, "config", None)
    kinds = getattr(config, "layer_types", None) or ()
    plain = all(kind == "full_attention" for kind in kinds) and (kinds or not getattr(config, "sliding_window", None))
    if hf.attention_of(backbone) != hf.PLAIN_ATTENTION or not plain:
        return False
    if next(backbone.parameters()).device.type != "cpu":
        return False
    if not _KNOWN:
        hf.step_aside("Sequences are padded", "attention cannot be registered by name")
        return False
    try:
        return same()
    except NoSpans:
        return False
    except Exception as error:  # whatever a release that hands attention other arguments may raise
        hf.step_aside("Sequences are padded", error)
        return False
