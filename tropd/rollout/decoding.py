"""One token for every live row, without what a general forward pass does around the arithmetic.

With a handful of rows a step of a small model takes longer to arrange than to compute.  Here queries, keys and values
are one product, so are the two halves of the gated layer, masks are made once and the cache is written in place:

    h <- h + W_o attention(rotate(norm(W_qkv norm(h)))),    h <- h + W_down (act(W_gate norm(h)) * W_up norm(h))

The modules' own weights, embedding, rotary table and head are used, in the order of operations of `transformers`.
Families that are built otherwise, hooks and other devices run the model's own forward: `obstacle` says why.

Axes: B live rows, D width of a head, Q query heads, J key and value heads, T columns of the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from tropd.rollout.cache import RowCache
from tropd.rollout.packing import Product, are_large, fit_twice, packed
from tropd.student.head import differ

_FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_MIN_STEPS = 16
"""Making the joint matrices costs about as much as three steps."""


class Decoder:
    """A step of generation for the families above."""

    def __init__(self, base: Any, pack: bool) -> None:
        self.base, self.backbone = base, base.model
        config = base.config
        self.num_key_heads: int = config.num_key_value_heads
        self.num_query_heads: int = config.num_attention_heads
        self.layers = [_Layer(layer, self.num_query_heads, self.num_key_heads, pack) for layer in self.backbone.layers]
        self.norm = _Norm(self.backbone.norm)

    def copied(self) -> set[int]:
        """The modules whose weights are copied here."""
        products = [p for layer in self.layers for p in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        return {id(module) for product in products if product.joined for module in product.modules}

    def __call__(self, last_ids_B1: Tensor, cache: RowCache) -> Tensor:
        """The logits [B, V] after each row's last token, whose keys and values enter the cache."""
        hidden_BH = self.backbone.embed_tokens(last_ids_B1)[:, 0]
        cos_B1D, sin_B1D = self.backbone.rotary_emb(hidden_BH, cache.positions())
        half = sin_B1D.shape[-1] // 2
        turn = cos_B1D, torch.cat([-sin_B1D[..., :half], sin_B1D[..., half:]], dim=-1)
        looks_BT = cache.mask()
        bias = None
        if looks_BT is not None:
            bias = torch.zeros(looks_BT.shape, dtype=hidden_BH.dtype).masked_fill_(looks_BT == 0, -torch.inf)
            bias = bias[:, None, None].expand(-1, -1, self.num_query_heads // self.num_key_heads, -1)
        for index, layer in enumerate(self.layers):
            hidden_BH = self._attend(layer, index, hidden_BH, turn, bias, cache)
            gate, up = layer.gate_up(layer.mlp_norm(hidden_BH)).chunk(2, dim=-1)
            hidden_BH = hidden_BH + layer.down(layer.act(gate) * up)
        return self.base.lm_head(self.norm(hidden_BH))

    def _attend(
        self,
        layer: _Layer,
        index: int,
        hidden_BH: Tensor,
        turn: tuple[Tensor, Tensor],
        bias: Tensor | None,
        cache: RowCache,
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
        self.epsilon = torch.tensor(float(module.variance_epsilon))

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
    out: Product
    mlp_norm: _Norm
    gate_up: Product
    act: Any
    down: Product
    scale: float

    def __init__(self, layer: Any, num_queries: int, num_keys: int, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norm, self.mlp_norm = _Norm(layer.input_layernorm), _Norm(layer.post_attention_layernorm)
        self.qkv = Product([attention.q_proj, attention.k_proj, attention.v_proj], pack)
        self.out, self.scale = Product([attention.o_proj], pack), attention.scaling
        self.gate_up, self.down = Product([mlp.gate_proj, mlp.up_proj], pack), Product([mlp.down_proj], pack)
        self.act, self.head_norm = mlp.act_fn, None
        if hasattr(attention, "q_norm"):
            weights = [(attention.q_norm, num_queries), (attention.k_norm, num_keys)]
            of_heads = [norm.weight.detach().expand(heads, -1) for norm, heads in weights]
            self.head_norm = _Norm(attention.q_norm, torch.cat(of_heads))


def obstacle(model: nn.Module, base: Any) -> str:
    """Why the decoder cannot run this model as it is now; empty where it can."""
    name, weight = type(base).__name__, next(base.parameters())
    if name not in _FAMILIES:
        return f"{name} is none of {', '.join(_FAMILIES)}"
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16):
        return f"its weights are {weight.dtype} on {weight.device.type}"
    if any(kind != "full_attention" for kind in getattr(base.config, "layer_types", None) or ()):
        return "it has sliding windows"
    if hasattr(model, "_orig_mod"):
        return "it is compiled"
    parts = [base, base.model, base.model.norm, *(m for layer in base.model.layers for m in layer.modules())]
    if any(m._forward_hooks or m._forward_pre_hooks for m in parts):
        return "it has hooks"
    return "" if fit_twice(list(base.modules())) else "its frozen weights are too large to keep a copy of them"


class Stepper:
    """How a model is stepped: by the decoder where that is possible, else by its own forward, packed if that pays."""

    def __init__(self, model: nn.Module, base: Any, own: Callable[[Tensor, RowCache], Tensor]) -> None:
        """`own`: the logits [B, V] after each row's last token, by the model's own forward."""
        self.model, self.base, self.own = model, base, own
        self.decoder: Decoder | None = None
        self.compared = self.misread = False

    @contextmanager
    def ready(self, num_steps: Sequence[int]) -> Iterator[None]:
        """Make the copies that a call of generate uses."""
        if max(num_steps, default=0) < _MIN_STEPS:
            yield
            return
        linear, head = [m for m in self.base.modules() if type(m) is nn.Linear], self.base.get_output_embeddings()
        chosen = linear if are_large(linear) and fit_twice(linear) else [head] if are_large([head]) else []
        if not self.misread and not obstacle(self.model, self.base):
            self.decoder = Decoder(self.base, pack=bool(chosen))
            copied = self.decoder.copied()
            chosen = [m for m in chosen if id(m) not in copied]
        try:
            with packed(chosen):
                yield
        finally:
            self.decoder = None

    def logits(self, last_ids_B1: Tensor, cache: RowCache) -> Tensor:
        """The logits [B, V] after each row's last token.  The decoder's first are compared with the model's.

        Both write the cache's newest column, so the one whose logits are used goes last: a process that compares
        then goes on as one that does not.
        """
        if self.decoder is None:
            return self.own(last_ids_B1, cache)
        if self.compared:
            return self.decoder(last_ids_B1, cache)
        own_BV = self.own(last_ids_B1, cache)
        logits_BV = self.decoder(last_ids_B1, cache)
        self.compared = bool(own_BV.isfinite().all())  # else the caller is about to refuse them
        self.misread = self.compared and differ(logits_BV[:, : own_BV.shape[1]], own_BV)
        if not self.misread:
            return logits_BV
        self.decoder = None
        warnings.warn(
            f"{type(self.base).__name__} gives other logits than tropd.rollout.decoding reads from its "
            "layers, so its own forward writes instead: the same tokens, slower.",
            stacklevel=2,
        )
        return self.own(last_ids_B1, cache)
