"""From hidden states to log-probabilities, with exactly the model's own logits.

Families differ in what follows the matrix product (a factor, a divisor, a soft cap).  Their configurations say which;
a probe at construction compares with the model itself, so a family that differs is refused and never misread.

The head runs tile by tile and each tile is recomputed in backward: nothing has tokens times vocabulary elements unless
the whole distribution is wanted.  Sums over the vocabulary are taken in float32 or better, while the matrix product
keeps the precision of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.errors import ConfigError
from tropd.model import hf
from tropd.model.likeliest import likeliest
from tropd.model.peaks import find_peaks, has_peaks, is_matrix, products_at
from tropd.objective.evidence import at_least_float32

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Relative differences that kernels of other shapes may cause; a wrong head or a leak causes one near 1."""


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; afterwards each module has its previous mode."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether |a - b| > tolerance * |b| for the precision they were computed in."""
    tolerance = TOLERANCE.get(b.dtype, 5e-2)
    a, b = a.double() if a.device.type != "mps" else a.float(), b.to(a.device)
    return not bool((a - b).norm() <= tolerance * b.norm().clamp_min(1e-30))


def causal_lm_of(model: nn.Module) -> Any:
    """The model with the language-model head, without a PEFT wrapper; an error if there is none."""
    name = type(model).__name__
    outside: Any = model
    inside = outside.get_base_model() if hasattr(model, "get_base_model") else outside
    if not (hasattr(inside, "config") and hasattr(inside, "get_output_embeddings")):
        raise ConfigError(
            f"a causal language model was asked for, but {name} is no transformers model. Load one with "
            "AutoModelForCausalLM.from_pretrained(...)."
        )
    if getattr(inside.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"a causal language model was asked for, but {name} is an encoder-decoder. Use a "
            "decoder-only model (AutoModelForCausalLM)."
        )
    if inside.get_output_embeddings() is None or inside.base_model is inside:
        raise ConfigError(
            f"a causal language model was asked for, but {name} has no language-model head. Load it with "
            "AutoModelForCausalLM instead of AutoModel or a classifier."
        )
    return inside


@dataclass(frozen=True, kw_only=True, eq=False)
class Head:
    """z = cap * tanh(y / cap) with y = (W h + b) * factor / divisor, cut to the first `vocab_size` tokens.

    The module itself is called, so adapters, tied weights and hooks take part and get their gradients.
    """

    module: nn.Module
    vocab_size: int
    factor: float = 1.0
    divisor: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int | None = None) -> Head:
        """The head of any Hugging Face causal language model, checked against that model's own logits."""
        inside = causal_lm_of(model)
        module, config = inside.get_output_embeddings(), inside.config.get_text_config()
        num_rows = module.weight.shape[0]
        if vocab_size is not None and not 0 < vocab_size <= num_rows:
            raise ConfigError(
                f"vocab_size = {vocab_size} was asked for, but the head of {type(inside).__name__} has "
                f"{num_rows} rows. Give a number from 1 to {num_rows}, or None for all."
            )
        factor = divisor = 1.0
        for name in hf.FACTORS:
            factor *= _number(config, name, 1.0)
        if getattr(config, "model_type", "").startswith("hyperclovax"):  # multiplies by what Granite divides by
            factor *= _number(config, "logits_scaling", 1.0)
        else:
            divisor = _number(config, "logits_scaling", 1.0)
        softcap = next((cap for name in hf.CAPS if (cap := _number(config, name, 0.0))), None)
        head = cls(module=module, vocab_size=vocab_size or num_rows, factor=factor, divisor=divisor, softcap=softcap)
        _check(head, model, inside)
        return head

    @property
    def weight_VH(self) -> Tensor:
        """The base weight with its padded rows; an adapter on the head is not in it."""
        return cast(Tensor, self.module.weight)

    @property
    def bias_V(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self.module, "bias", None))

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """The logits of the model's own forward for these hidden states, in the model's dtype."""
        return self.transform(self.module(hidden_NH)[..., : self.vocab_size])

    def transform(self, logits_NV: Tensor) -> Tensor:
        """Scale and soft-cap the product of the matrix."""
        if self.factor != 1.0:
            logits_NV = logits_NV * self.factor
        if self.divisor != 1.0:
            logits_NV = logits_NV / self.divisor
        if self.softcap is not None:
            logits_NV = torch.tanh(logits_NV / self.softcap) * self.softcap
        return logits_NV

    def wide_logits(self, hidden_CH: Tensor, written_C: Tensor) -> Tensor:
        """`logits` in float32 at least; where the matrix rounds, the row's peaks are exact (`tropd.model.peaks`)."""
        return self.widened(self.module(hidden_CH)[..., : self.vocab_size], hidden_CH, written_C)

    def widened(self, z_CV: Tensor, hidden_CH: Tensor, written_C: Tensor) -> Tensor:
        """Logits of what the matrix gave.  The gradient of the peaks is that of the others."""
        wide_CV = self.transform(at_least_float32(z_CV))
        if not (has_peaks(z_CV.dtype) and is_matrix(self.module)):
            return wide_CV
        with torch.no_grad():
            exact = partial(products_at, hidden_CH, self.weight_VH, self.bias_V, 1.0)
            ids_CE, exact_CE = (peaks := find_peaks(z_CV, written_C, exact)).ids_CE, self.transform(peaks.exact_CE)
            changes_CE = torch.where(peaks.twice_CE, 0.0, exact_CE - wide_CV.gather(1, ids_CE))
        return wide_CV.scatter_add(1, ids_CE, changes_CE)

    def read(
        self,
        hidden_NH: Tensor,
        ids_NM: Tensor,
        tile_tokens: int,
        *,
        top_k: int = 0,
        entropy: bool = False,
        full: bool = False,
    ) -> dict[str, Tensor]:
        """Log-probabilities at the wanted tokens ("at") and more on request: see `read_logits`.

        With gradient, a tile's logits are computed again in backward and never kept.
        """

        def read_tile(hidden_NH: Tensor, ids_NM: Tensor) -> dict[str, Tensor]:
            return read_logits(self.wide_logits(hidden_NH, ids_NM[:, 0]), ids_NM, top_k, entropy, full)

        found = []
        for tile in tiles(hidden_NH.shape[0], tile_tokens):
            if torch.is_grad_enabled():
                found.append(checkpoint(read_tile, hidden_NH[tile], ids_NM[tile], use_reentrant=False))
            else:
                found.append(read_tile(hidden_NH[tile], ids_NM[tile]))
        return {name: torch.cat([part[name] for part in found]) for name in found[0]}


def tiles(num_tokens: int, tile_tokens: int) -> Iterator[slice]:
    """Slices of tokens; a single empty slice if there are none, so that shapes are right."""
    if num_tokens > tile_tokens:
        TAKEN.add(FastPath.SEVERAL_TILES)
    for start in range(0, max(num_tokens, 1), tile_tokens):
        yield slice(start, start + tile_tokens)


def read_logits(
    logits_NV: Tensor, ids_NM: Tensor, top_k: int = 0, entropy: bool = False, full: bool = False
) -> dict[str, Tensor]:
    """log pi(v) = z_v - log sum_u exp(z_u), at the wanted tokens, and more on request."""
    log_z_N1 = logits_NV.logsumexp(-1, keepdim=True)
    found = {"at": logits_NV.gather(1, ids_NM) - log_z_N1, "log_z": log_z_N1}
    if top_k:
        found["topk_ids"], topk_logits_NK = likeliest(logits_NV, top_k)
        found["topk"] = topk_logits_NK - log_z_N1
    if entropy:
        found["entropy"] = torch.special.entr((logits_NV - log_z_N1).exp()).sum(-1)
    if full:
        found["full"] = logits_NV - log_z_N1
    return found


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    return default if value is None else float(value)


@torch.no_grad()
def _check(head: Head, model: nn.Module, inside: Any) -> None:
    """Refuse a model that looks ahead, has more than backbone and head, or has another head than described."""
    name, num_rows = type(inside).__name__, head.weight_VH.shape[0]
    ids_T = torch.arange(8, device=head.weight_VH.device) % num_rows
    ids_BT = torch.stack([ids_T, ids_T])
    ids_BT[1, 5:] = (ids_T[5:] + num_rows // 2) % num_rows
    with at_rest(model):
        hidden_BTH = inside.get_decoder()(input_ids=ids_BT, use_cache=False)[0]
        own_BTH, loud_BTH, logits_BTV = _ask(head, model, inside.get_decoder(), ids_BT)
        if not bool(hidden_BTH.isfinite().all()):
            raise ConfigError(f"{name} gives hidden states that are not finite. Check its weights and its precision.")
        if differ(hidden_BTH[0, :5], hidden_BTH[1, :5]):
            raise ConfigError(
                f"a causal language model was asked for, but in {name} a token changes what comes before it: it looks "
                "ahead. Use a decoder (for BERT-like models: is_decoder=True)."
            )
        if own_BTH.shape != hidden_BTH.shape or differ(own_BTH, hidden_BTH):
            raise ConfigError(
                f"{type(model).__name__} around {name} does more than its backbone and its head (prompt tuning, for "
                "instance), which cannot be split. Use full weights or LoRA."
            )
        if differ(head.logits(loud_BTH), logits_BTV[..., : head.vocab_size]):
            raise ConfigError(
                f"the head of {name} was read as {head.factor:g} * (W h + b) / {head.divisor:g} with soft cap "
                f"{head.softcap}, but its own forward gives other logits. This family is not supported: teach "
                "`tropd.model.head.Head` its transform."
            )


def _ask(head: Head, model: nn.Module, backbone: nn.Module, ids_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The model's own hidden states, loud ones in their place, and the model's logits for the loud ones.

    A cap or a factor shows on loud hidden states whatever the weights are.
    """
    own: list[Tensor] = []
    loud: list[Tensor] = []

    def replace(module: nn.Module, inputs: Any, output: Any) -> Any:
        own.append(output[0])
        loud.append(_loud(head.module, output[0]))
        if isinstance(output, tuple):
            return (loud[0], *output[1:])
        output.last_hidden_state = loud[0]
        return output

    handle = backbone.register_forward_hook(replace)
    try:
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    finally:
        handle.remove()
    if len(own) != 1:
        raise ConfigError(
            f"{type(model).__name__} runs its {type(backbone).__name__} {len(own)} times in one forward pass, so its "
            "head cannot be split off. This family is not supported."
        )
    return own[0], loud[0], logits_BTV


def _loud(module: nn.Module, like_BTH: Tensor) -> Tensor:
    """Hidden states whose largest product with the head's rows is 1, 10 or 100, by position."""
    wave = torch.sin(torch.arange(like_BTH.numel(), dtype=torch.float32, device=like_BTH.device) + 1.0)
    hidden_BTH = wave.view(like_BTH.shape).to(like_BTH.dtype)
    peak_BT1 = module(hidden_BTH).abs().amax(-1, keepdim=True).clamp_min(1e-4)
    target_T1 = 10.0 ** (torch.arange(like_BTH.shape[1], device=like_BTH.device) % 3).unsqueeze(-1)
    return hidden_BTH * (target_T1 / peak_BT1).to(like_BTH.dtype)
