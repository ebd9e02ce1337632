"""Everything that tropd knows of the insides of `transformers`: names that a new release may change.

Each entry was run with transformers 5.0 to 5.24 (`make test-oldest`, `make test`).  If an inside differs from this
description, tropd takes the plain path and says so: a new release costs speed, never the run.

    inside                      fast path                       plain path
    cache classes and argument  keys and values are kept        each text is read whole for every token
    parts of a family           `tropd.rollout.decoding`        the model's own forward
    attention by name           sequences without padding       a padded rectangle
    masks of four axes          steps recorded as CUDA graphs   steps launched one by one
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn


class Unexpected(Exception):
    """An inside of transformers differs from what this module describes."""


def step_aside(slower: str, reason: BaseException | str) -> str:
    """Log that a fast path is left, and why; returns the reason.  The numbers stay the same."""
    from transformers import __version__

    why = reason if isinstance(reason, str) else f"{type(reason).__name__}: {str(reason).strip() or 'no message'}"
    short = why.splitlines()[0][:200].rstrip(" .")
    warnings.warn(f"{slower} with transformers {__version__}: the same numbers, slower ({short}).", stacklevel=3)
    return short


def _inside(module: str, name: str) -> Any:
    """A class of transformers, or an empty class if this release lacks it."""
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        missing.append(f"{module} has no {name}")
        return type(name, (), {})


missing: list[str] = []
"""The classes that this release lacks."""

if TYPE_CHECKING:
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer
else:
    Cache, DynamicCache, DynamicLayer = (
        _inside("transformers.cache_utils", name) for name in ("Cache", "DynamicCache", "DynamicLayer")
    )

CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of the key-value cache in a model's forward: the first since 5.24, the second before."""


def takes(model: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in inspect.signature(model.forward).parameters


def cache_argument(model: Any) -> str | None:
    """The name of the key-value cache in this model's forward; None if no known name fits."""
    return None if missing else next((name for name in CACHE_ARGUMENTS if takes(model, name)), None)


def query_length(asked: int | Tensor) -> int:
    """The argument with which a cache gives the size of a mask: a number since 5.4, the queries' positions before."""
    return asked if isinstance(asked, int) else asked.shape[0]


def layers_of(cache: DynamicCache) -> list[DynamicLayer]:
    """The layers that a forward pass filled."""
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.keys is not None]
    if not layers or len(layers) != len(cache.layers):
        raise Unexpected(
            f"the model did not fill the key-value cache it was handed: {len(layers)} of {len(cache.layers)} layers "
            "hold keys and values"
        )
    return layers


def layer_types(model: Any) -> set[str]:
    """The attention type of each layer, if the configuration has it."""
    return set(getattr(model.config.get_text_config(), "layer_types", None) or ())


CHECKPOINTING = "gradient_checkpointing"
_ENABLE = ("activation_checkpointing", "gradient_checkpointing")
"""The first since 5.24, the second before: `..._enable(..._kwargs=...)`, `is_...`."""


def enable_checkpointing(model: Any) -> None:
    """Make layers recompute their activations in backward instead of keeping them."""
    name = next((name for name in _ENABLE if hasattr(model, f"{name}_enable")), _ENABLE[0])
    getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})


def checkpointed(model: nn.Module) -> list[nn.Module]:
    """The modules that recompute in backward."""
    # vars, not getattr: a LoRA wrapper answers for the model inside it, and setting it there would leave a copy.
    return [module for module in model.modules() if vars(module).get(CHECKPOINTING) is True]


def recomputes(model: nn.Module) -> bool:
    """Whether layers recompute in backward; if the flag has another name, the model's own property counts."""
    name = next((name for name in _ENABLE if hasattr(model, f"{name}_enable")), _ENABLE[0])
    return model.training and bool(checkpointed(model) or getattr(model, f"is_{name}", False))


def block_names(model: nn.Module) -> set[str]:
    """The classes of the layers into which a model is sharded."""
    return set(getattr(model, "_no_split_modules", None) or ())


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a causal language model in order; empty if this release keeps them in no list."""
    blocks, decoder = block_names(model), model.get_decoder()
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module)]
    return next((list(x) for x in lists if all(type(layer).__name__ in blocks for layer in x)), [])


_IMPLEMENTATION = "_attn_implementation_internal"
PLAIN_ATTENTION = "sdpa"


def register_attention(name: str, attention: Callable[..., Any]) -> bool:
    """Register an attention function under a name; False if this release cannot."""
    register = getattr(_inside("transformers", "AttentionInterface"), "register", None)
    if register is not None:
        register(name, attention)
    return register is not None


def attention_of(model: Any) -> str | None:
    """The name of a model's attention; None if it is unknown."""
    return getattr(getattr(model, "config", None), _IMPLEMENTATION, None)


@contextmanager
def attending(model: Any, name: str) -> Iterator[None]:
    """Inside the block the model uses the attention of this name."""
    config, before = model.config, getattr(model.config, _IMPLEMENTATION)
    setattr(config, _IMPLEMENTATION, name)
    try:
        yield
    finally:
        setattr(config, _IMPLEMENTATION, before)


def quiet(*, warnings_too: bool = False) -> None:
    """No progress bars while models are read and written, and on request no warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    if warnings_too:
        logging.set_verbosity_error()


FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
"""Settings that a family's logits are multiplied by."""
CAPS = ("final_logit_softcapping", "logits_soft_cap")
"""Settings that a family's logits are soft-capped at."""

MASK_DRIVEN = (
    "CohereForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "Gemma2ForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Families whose layers attend exactly as a mask of four axes says, wherever in the cache the keys are."""


def windows_of(model: Any) -> dict[str, int | None]:
    """How far back each kind of layer looks, None for everything; the kind is "" if one mask serves all layers.

    Empty if tropd cannot make the model's masks.
    """
    config = model.config.get_text_config()
    if type(model).__name__ not in MASK_DRIVEN or attention_of(model) not in ("eager", PLAIN_ATTENTION):
        return {}
    window, kinds = getattr(config, "sliding_window", None), layer_types(model)
    if not kinds:
        return {"": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Families whose parts have the names below."""
PARTS = {
    "embed": "model.embed_tokens",
    "rotary": "model.rotary_emb",
    "layers": "model.layers",
    "norm": "model.norm",
    "head": "lm_head",
    "num_query_heads": "config.num_attention_heads",
    "num_key_heads": "config.num_key_value_heads",
}
LAYER_PARTS = {
    "norm": "input_layernorm",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "scale": "self_attn.scaling",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "act": "mlp.act_fn",
}
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
"""Of Qwen3 alone."""
EPSILON = "variance_epsilon"


@dataclass(frozen=True, kw_only=True)
class LayerParts:
    """The parts of one decoder layer."""

    norm: Any
    query: Any
    key: Any
    value: Any
    out: Any
    scale: float
    mlp_norm: Any
    gate: Any
    up: Any
    down: Any
    act: Any
    head_norms: tuple[Any, Any] | None


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The parts of a model of one of the families."""

    embed: Any
    rotary: Any
    layers: list[LayerParts]
    norm: Any
    head: Any
    num_query_heads: int
    num_key_heads: int
    modules: list[nn.Module]
    """Whose own forward is gone around."""


def parts_of(base: Any) -> Parts:
    """The parts of a model; raises `Unexpected` if it is built differently."""
    name = type(base).__name__
    if name not in FAMILIES:
        raise Unexpected(f"{name} is none of {', '.join(FAMILIES)}")
    parts = {part: _get(base, path) for part, path in PARTS.items()}
    owners = list(parts["layers"])
    layers = [_layer_of(layer) for layer in owners]
    epsilon_of(parts["norm"])
    around = [base, base.get_decoder(), parts["norm"], *(module for layer in owners for module in layer.modules())]
    return Parts(**{**parts, "layers": layers}, modules=around)


def epsilon_of(norm: Any) -> float:
    return float(_get(norm, EPSILON))


def _layer_of(layer: Any) -> LayerParts:
    parts = {part: _get(layer, path) for part, path in LAYER_PARTS.items()}
    query_norm, key_norm = HEAD_NORMS
    head_norms = (_get(layer, query_norm), _get(layer, key_norm)) if _has(layer, query_norm) else None
    for norm in (parts["norm"], parts["mlp_norm"], *(head_norms or ())):
        epsilon_of(norm)
    return LayerParts(**parts, head_norms=head_norms)


def _get(owner: Any, path: str) -> Any:
    for name in path.split("."):
        if not hasattr(owner, name):
            raise Unexpected(f"its {type(owner).__name__} has no {name}")
        owner = getattr(owner, name)
    return owner


def _has(owner: Any, path: str) -> bool:
    try:
        return _get(owner, path) is not None
    except Unexpected:
        return False
