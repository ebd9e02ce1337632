"""The logits that decide a row of a half-precision tile, computed again in float32.

    z      logits of the tile, rounded to its precision: at 20, bfloat16 is off by up to .06
    E      the written token and the row's 8 likeliest
    z~     z, but exact at E
    Z~     sum_E exp z~ + (Z - sum_E exp z)                       the rest of the sum keeps its small errors

log p(v) = z~_v - log Z~ then has one error for numerator and denominator alike, is never above 0, and is the same for
two models with the same states.  With the written token alone exact, a sure token's log-probability would be the
rounding noise of log Z.  Wide tiles have no peaks: every tensor here has no columns then, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tropd.base.fast_paths import TAKEN, FastPath
from tropd.model.likeliest import largest
from tropd.model.parts import GATHERED

NUM_PEAKS = 8
"""Where 2 to 5 tokens share the mass, 1 leaves errors of 1e-2, 8 of 1e-4 or less."""


@dataclass(frozen=True, eq=False)
class Peaks:
    """Axis E: the written token, then the likeliest; if the written one is among those, its second entry is -inf."""

    ids_CE: Tensor
    exact_CE: Tensor
    rounded_CE: Tensor

    def rows(self, rows: Tensor) -> Peaks:
        return Peaks(self.ids_CE[rows], self.exact_CE[rows], self.rounded_CE[rows])

    @property
    def highest_C(self) -> Tensor | None:
        """Where each row of z is largest."""
        if not self.ids_CE.shape[1]:
            return None
        return self.ids_CE.gather(1, self.rounded_CE.argmax(1, keepdim=True))[:, 0]

    @property
    def twice_CE(self) -> Tensor:
        """Second entries of the written token."""
        return self.exact_CE == -torch.inf

    def patch(self, ids_CM: Tensor, logits_CM: Tensor) -> Tensor:
        """z~ at some tokens, from z there."""
        logits_CM = logits_CM.to(self.exact_CE.dtype)
        if not self.ids_CE.shape[1]:
            return logits_CM
        same_CME = ids_CM[:, :, None] == self.ids_CE[:, None, :]
        exact_CM = self.exact_CE.gather(1, same_CME.byte().argmax(-1))
        return torch.where(same_CME.any(-1), exact_CM, logits_CM)

    def pool(self, top_k: int, vocab_size: int) -> int:
        """How many of the likeliest tokens of z hold the `top_k` of z~, as far as peaks decide that."""
        return min(top_k + self.ids_CE.shape[1], vocab_size)

    def best(self, ids_CP: Tensor, logits_CP: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """The likeliest tokens of z~ among those of z, with their z~."""
        logits_CP = self.patch(ids_CP, logits_CP)
        if not self.ids_CE.shape[1]:
            return ids_CP, logits_CP
        logits_CP, order_CP = logits_CP.sort(dim=1, descending=True, stable=True)
        return ids_CP.gather(1, order_CP[:, :top_k]), logits_CP[:, :top_k]

    def log_sum(self, log_sum_C: Tensor) -> Tensor:
        """log Z~, from log Z.  At least the largest exact logit, so that no log-probability is above 0."""
        if not self.ids_CE.shape[1]:
            return log_sum_C
        rest_C = log_sum_C + self._rest(log_sum_C).log()
        return torch.cat([self.exact_CE, rest_C[:, None]], dim=1).logsumexp(1)

    def entropy(self, entropy_C: Tensor, log_sum_C: Tensor, exact_log_sum_C: Tensor) -> Tensor:
        """H~ = -sum p~ log p~, from H and log Z: outside E, p~ = p exp(log Z - log Z~)."""
        if not self.ids_CE.shape[1]:
            return entropy_C
        before_CE, after_CE = self.rounded_CE - log_sum_C[:, None], self.exact_CE - exact_log_sum_C[:, None]
        fall_C = log_sum_C - exact_log_sum_C
        rest_C = entropy_C - torch.special.entr(before_CE.exp()).sum(1)
        rest_C = fall_C.exp() * (rest_C - fall_C * self._rest(log_sum_C))
        return (rest_C + torch.special.entr(after_CE.exp()).sum(1)).clamp_min(0.0)

    def _rest(self, log_sum_C: Tensor) -> Tensor:
        """How much of p lies outside E."""
        return (1.0 - (self.rounded_CE - log_sum_C[:, None]).exp().sum(1)).clamp_min(0.0)


def has_peaks(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def find_peaks(
    z_CV: Tensor, written_C: Tensor, exact: Callable[[Tensor], Tensor], maxima_CW: Tensor | None = None
) -> Peaks:
    """The peaks of a tile.  `exact`: ids [C, E] -> logits there, in float32."""
    if not has_peaks(z_CV.dtype):
        none = z_CV.new_empty(len(z_CV), 0)
        return Peaks(none.long(), none, none)
    TAKEN.add(FastPath.PEAKS)
    likely_CE = largest(z_CV, min(NUM_PEAKS, z_CV.shape[1]), maxima_CW)
    rounded_CE = torch.cat([z_CV.gather(1, written_C[:, None]), z_CV.gather(1, likely_CE)], dim=1)
    return make_peaks(torch.cat([written_C[:, None], likely_CE], dim=1), rounded_CE, exact)


def make_peaks(ids_CE: Tensor, rounded_CE: Tensor, exact: Callable[[Tensor], Tensor]) -> Peaks:
    """From the tokens, the written one first, and their logits in the tile."""
    twice_CE = ids_CE == ids_CE[:, :1]
    twice_CE[:, :1] = False
    exact_CE = exact(ids_CE).masked_fill(twice_CE, -torch.inf)
    return Peaks(ids_CE, exact_CE, rounded_CE.to(exact_CE.dtype).masked_fill(twice_CE, -torch.inf))


def products_at(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, scale: float, ids_CE: Tensor) -> Tensor:
    """scale * (W[id] h + b[id]) in float32 at least."""
    wide = torch.promote_types(hidden_CH.dtype, torch.float32)
    found = [
        (weight_VH[ids].to(wide) * hidden.to(wide)[:, None]).sum(2)
        for ids, hidden in zip(ids_CE.split(GATHERED), hidden_CH.split(GATHERED), strict=True)
    ]
    products_CE = torch.cat(found) if found else hidden_CH.new_empty(ids_CE.shape, dtype=wide)
    return scale * (products_CE if bias_V is None else products_CE + bias_V[ids_CE].to(wide))


def is_matrix(module: nn.Module) -> bool:
    """Whether a head is a plain matrix, so that a product with some of its rows is the logit there."""
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks
