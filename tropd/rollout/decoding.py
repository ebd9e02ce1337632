"""One token for every live row, without the overhead of a general forward pass.

With a handful of rows a step of a small model takes longer to arrange than to compute.  Here queries, keys and values
are one product, so are the two halves of the gated layer, masks are made once and the cache is written in place:

    h <- h + W_o attention(rotate(norm(W_qkv norm(h)))),    h <- h + W_down (act(W_gate norm(h)) * W_up norm(h))

The modules' own weights, embedding, rotary table and head are used, in the order of operations of `transformers`.
Other families, and models with hooks, run the model's own forward: `obstacle` says why.

Axes: B live rows, D width of a head, Q query heads, J key and value heads, T columns of the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model import hf
from tropd.model.head import differ
from tropd.rollout.cache import RowCache
from tropd.rollout.graphs import Graphs
from tropd.rollout.packing import Product, are_large, fit_twice, packed
from tropd.rollout.slots import SlotCache

MIN_STEPS = 16
"""Fewest steps for which joint matrices are made: making them costs about three steps, as recording does."""


class Decoder:
    """A step of generation for the families above."""

    def __init__(self, base: Any, pack: bool) -> None:
        self.parts = parts = hf.parts_of(base)
        self.num_query_heads, self.num_key_heads = parts.num_query_heads, parts.num_key_heads
        self.layers = [_Layer(layer, self.num_query_heads, self.num_key_heads, pack) for layer in parts.layers]
        self.norm = _Norm(parts.norm)

    def copied(self) -> set[int]:
        """The modules whose weights are copied here."""
        products = [p for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return {id(module) for product in products if product.joined for module in product.modules}

    def refresh(self) -> None:
        """Copy the norms of heads again."""
        for layer in self.layers:
            layer.refresh()

    def __call__(self, last_ids_B1: Tensor, cache: RowCache | SlotCache) -> Tensor:
        """The logits [B, V] after each row's last token, whose keys and values enter the cache."""
        TAKEN.add(FastPath.DECODER)
        hidden_BH = self.parts.embed(last_ids_B1)[:, 0]
        cos_B1D, sin_B1D = self.parts.rotary(hidden_BH, cache.positions())
        half = sin_B1D.shape[-1] // 2
        turn = cos_B1D, torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], dim=-1)
        looks_BT = cache.looks()
        bias = None
        if looks_BT is not None:
            bias = hidden_BH.new_zeros(looks_BT.shape).masked_fill_(looks_BT == 0, -torch.inf)
            bias = bias[:, None, None].expand(-1, -1, self.num_query_heads // self.num_key_heads, -1)
        for index, layer in enumerate(self.layers):
            hidden_BH = self._attend(layer, index, hidden_BH, turn, bias, cache)
            gate, up = layer.gate_up(layer.mlp_norm(hidden_BH)).chunk(2, dim=-1)
            hidden_BH = hidden_BH + layer.down(layer.act(gate) * up)
        return self.parts.head(self.norm(hidden_BH))

    def _attend(
        self,
        layer: _Layer,
        index: int,
        hidden_BH: Tensor,
        turn: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: Any,
    ) -> Tensor:
        num_queries, num_keys = self.num_query_heads, self.num_key_heads
        states_BAD = layer.qkv(layer.norm(hidden_BH)).view(len(hidden_BH), num_queries + 2 * num_keys, -1)
        turned_BAD, values_BJD = states_BAD[:, : num_queries + num_keys], states_BAD[:, num_queries + num_keys :]
        if layer.head_norm is not None:
            turned_BAD = layer.head_norm(turned_BAD)
        cos_B1D, sin_B1D = turn
        turned_BAD = turned_BAD * cos_B1D + turned_BAD.roll(turned_BAD.shape[-1] // 2, -1) * sin_B1D
        keys, values = cache.layers[index].update(turned_BAD[:, num_queries:, None], values_BJD[:, :, None])
        # The queries of a key head as the rows of one product: keys and values are read once, and never repeated.
        queries = turned_BAD[:, :num_queries].unflatten(1, (num_keys, -1))
        mixed = scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=layer.scale)
        return hidden_BH + layer.out(mixed.flatten(1))


class _Norm:
    """x / sqrt(mean x^2 + eps) * weight, in float32 up to the weight as the families do it."""

    def __init__(self, module: Any, weight: Tensor | None = None) -> None:
        self.weight: Tensor = module.weight.detach() if weight is None else weight
        self.width = self.weight.shape[-1]
        self.epsilon = torch.tensor(hf.epsilon_of(module), device=self.weight.device)

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.float()
        length = torch.linalg.vector_norm(wide, 2, -1, True)
        scale = torch.addcmul(self.epsilon, length, length, value=1 / self.width).rsqrt_()
        return (wide * scale).to(x.dtype).mul_(self.weight)


@dataclass(init=False, slots=True)
class _Layer:
    norm: _Norm
    qkv: Product
    head_norm: _Norm | None
    of_heads: list[Tensor]
    """The weights that `head_norm` joins."""
    out: Product
    mlp_norm: _Norm
    gate_up: Product
    act: Any
    down: Product
    scale: float

    def __init__(self, layer: hf.LayerParts, num_queries: int, num_keys: int, pack: bool) -> None:
        self.norm, self.mlp_norm = _Norm(layer.norm), _Norm(layer.mlp_norm)
        self.qkv = Product([layer.query, layer.key, layer.value], pack)
        self.out, self.scale = Product([layer.out], pack), layer.scale
        self.gate_up, self.down = Product([layer.gate, layer.up], pack), Product([layer.down], pack)
        self.act, self.head_norm, self.of_heads = layer.act, None, []
        if layer.head_norms:
            weights = zip(layer.head_norms, (num_queries, num_keys), strict=True)
            self.of_heads = [norm.weight.detach().expand(heads, -1) for norm, heads in weights]
            self.head_norm = _Norm(layer.head_norms[0], torch.cat(self.of_heads))

    def refresh(self) -> None:
        if self.head_norm is not None:
            torch.cat(self.of_heads, out=self.head_norm.weight)


def obstacle(model: nn.Module, base: Any) -> str:
    """Why the decoder cannot run this model in its current state; empty if it can."""
    weight = next(base.parameters())
    try:
        parts = hf.parts_of(base)
    except hf.Unexpected as other:
        return str(other)
    dtypes = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
    if weight.dtype not in dtypes.get(weight.device.type, ()):
        return f"its weights are {weight.dtype} on {weight.device.type}"
    if hf.layer_types(base) - {"full_attention"}:
        return "it has sliding windows"
    if hasattr(model, "_orig_mod"):
        return "it is compiled"
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts.modules):
        return "it has hooks"
    return "" if fit_twice(list(base.modules())) else "its frozen weights are too large to keep a copy of them"


class Misread(Exception):
    """Decoder and model give different logits.  The call starts again without the decoder, as do later calls."""


class Stepper:
    """Steps a model: by the decoder if possible, else by the model's forward, with packed weights if that pays.

    `slots`, if given, makes every step one of fixed shape, which a GPU records and replays.
    """

    def __init__(self, model: nn.Module, base: Any, own: Callable[[Tensor, Any], Tensor]) -> None:
        """`own`: the logits [B, V] after each row's last token, by the model's own forward."""
        self.model, self.base, self.own = model, base, own
        self.decoder: Decoder | None = None
        self.compared = self.misread = False
        self.slots: SlotCache | None = None
        self.graphs = Graphs()

    def new_cache(self) -> RowCache | SlotCache:
        """An empty one."""
        if self.slots is None:
            return RowCache()
        self.slots.clear()
        return self.slots

    @contextmanager
    def ready(self, num_steps: Sequence[int]) -> Iterator[None]:
        """Make the copies that a call of generate uses."""
        if max(num_steps, default=0) < MIN_STEPS:
            yield
            return
        linear, head = [m for m in self.base.modules() if type(m) is nn.Linear], self.base.get_output_embeddings()
        chosen = linear if are_large(linear) and fit_twice(linear) else [head] if are_large([head]) else []
        recorded = self.slots is not None and (self.slots.device.type == "cuda" or self.graphs.recorder is not None)
        if recorded and self.graphs.begin(self.model):
            self.decoder = None
        if self.decoder is not None:
            self.decoder.refresh()
        elif not self.misread and not obstacle(self.model, self.base):
            try:
                self.decoder = Decoder(self.base, pack=bool(chosen))
                copied = self.decoder.copied()
                chosen = [m for m in chosen if id(m) not in copied]
            except Exception as error:  # whatever parts of another shape may raise
                self._leave_it(error)
        try:
            with packed(chosen):
                yield
        finally:
            if not recorded:  # a recording holds the addresses of the copies
                self.decoder = None

    def logits(self, last_ids_B1: Tensor, cache: RowCache | SlotCache) -> Tensor:
        """The logits [B, V] after each row's last token.  The decoder's first are compared with the model's.

        Both write the cache's newest column, so the one whose logits are used runs last.  A process that compares then
        continues like one that does not.
        """
        last_ids, live = cache.load(last_ids_B1), slice(len(last_ids_B1))
        if self.decoder is None or self.compared:
            return self.graphs(self.decoder or self.own, last_ids, cache)[live]
        own_BV = self.own(last_ids, cache)[live]
        try:
            logits_BV, failure = self.decoder(last_ids, cache)[live], None
        except Exception as error:  # whatever a part that takes or gives something else may raise
            logits_BV, failure = own_BV, error
        self.compared = bool(own_BV.isfinite().all())  # else the caller is about to refuse them
        if failure is None and not (self.compared and differ(logits_BV[:, : own_BV.shape[1]], own_BV)):
            return logits_BV
        self._leave_it(failure or "they differ")
        raise Misread

    def _leave_it(self, reason: Exception | str) -> None:
        self.decoder, self.misread = None, True
        reads = "gives other logits than tropd.rollout.decoding reads from its layers, so its own forward writes"
        hf.step_aside(f"{type(self.base).__name__} {reads}", reason)
