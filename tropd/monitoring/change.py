"""How far training has moved a few matrices from where they began.

    D = W_t - W_0,   K = 16 directions

After "On the Geometry of On-Policy Distillation" (arXiv:2606.07082).  Singular values and vectors come from a matrix
times its own transpose on the shorter side, in float64: all of them, to about 1e-8 of the largest.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from tropd.errors import CheckpointError, ConfigError
from tropd.model.head import causal_lm_of
from tropd.monitoring.probe import PROBE, Numbers, Probe, Weight
from tropd.objective.memory import Memory

_NOTHING = 1e-7
"""Singular values below this share of the largest are rounding."""


class Change(Probe):
    """The change of a few matrices since the start, a mean over them:

        change/unchanged_bf16  share of the entries whose value in bfloat16 is that of the start
        change/moved           sum |D| / sum |W_0|
        change/stable_rank     |D|_F^2 / |D|_2^2
        change/angle           the largest principal angle, in degrees, between the spaces of the first K singular
                               vectors of W_0 and of W_t, of the left or of the right ones, whichever is larger
        change/drift           |s(W_t) - s(W_0)| / |s(W_0)|, s all singular values
        change/sim             |V_K(first)^T V_K(t)|_F^2 / K: how much of D's first K right singular vectors lies in the
                               space of those of the first look after step 0.  1 is all, K / columns is chance

    `matrices` is a number of trained matrices, spread over the model without its embeddings and its head, or a list of
    patterns such as "*.layers.0.*".  With LoRA, W is the base with the adapter added.  Of several updates of a step the
    numbers are means.
    """

    name = "change"

    def __init__(self, matrices: int | Sequence[str] = 4, directions: int = 16) -> None:
        if isinstance(matrices, str) or (isinstance(matrices, int) and (matrices is True or matrices < 1)):
            raise ConfigError(f"matrices = {matrices!r}: give a number, 1 or more, or a list of patterns of names.")
        if directions < 1:
            raise ConfigError(f"directions = {directions}: give 1 or more.")
        self.matrices, self.directions = matrices, directions
        self.watched: dict[str, _Trained | _Adapted] = {}
        self.starts: dict[str, Tensor] = {}
        self.spectra: dict[str, Spectrum] = {}
        """Of the start."""
        self.memory = Memory()

    def begin(self, student: nn.Module, memory: Memory) -> None:
        every = _matrices(student)
        self.watched = {name: every[name] for name in _chosen(every, self.matrices)}
        self.starts = {name: matrix.start() for name, matrix in self.watched.items()}
        self.spectra, self.memory = {}, memory
        self.memory[self._named("start")] = self._digest()

    def go_on(self) -> None:
        held = self.memory.get(self._named("start"))
        if held is None:
            raise ConfigError(
                "probe 'change' compares with the student before training, and the checkpoint was made without the "
                "probe: nothing says that the student's weights are still those. Leave the probe out, or start a new "
                "run."
            )
        if not torch.equal(held, self._digest()):
            raise CheckpointError(
                "probe 'change' compares with the student before training, and the checkpoint was made with other "
                "matrices or with another student. Put back the probe's knob matrices and the student's weights, or "
                "leave the probe out."
            )

    def _digest(self) -> Tensor:
        """A number for the matrices of the start and their names."""
        digest = hashlib.sha256("\n".join(self.starts).encode())
        for start in self.starts.values():
            digest.update(start.contiguous().view(torch.uint8).numpy().tobytes())
        return torch.tensor(int.from_bytes(digest.digest()[:7]))

    def _named(self, what: str) -> str:
        """In the memory."""
        return f"{PROBE}{self.name}/{what}"

    def after_update(self, weights: Mapping[str, Weight]) -> Numbers:
        totals: dict[str, tuple[float, float]] = {}
        for name, matrix in self.watched.items():
            for number, (total, weight) in self._of(name, matrix.now(weights)).items():
                before = totals.get(number, (0.0, 0.0))
                totals[number] = before[0] + total, before[1] + weight
        return totals

    def _of(self, name: str, now: Tensor) -> Numbers:
        start = _wide(self.starts[name], now)
        changed = _wide(now, now) - start
        if name not in self.spectra:
            self.spectra[name] = Spectrum.of(start, self.directions)
        before, after, moved = self.spectra[name], Spectrum.of(start + changed, self.directions), changed.abs().sum()
        unchanged = self.starts[name].to(now.device, torch.bfloat16) == now.bfloat16()
        numbers = {
            "unchanged_bf16": (float(unchanged.sum()), now.numel()),
            "moved": (float(moved), float(start.abs().sum())),
            "angle": (max(angle(before.left_MK, after.left_MK), angle(before.right_NK, after.right_NK)), 1.0),
        }
        if float(before.values.norm()):
            numbers["drift"] = float((after.values - before.values).norm() / before.values.norm()), 1.0
        if not float(moved):
            return numbers
        spectrum, first = Spectrum.of(changed, self.directions), self._named(name)
        numbers["stable_rank"] = float((spectrum.values**2).sum() / spectrum.values[0] ** 2), 1.0
        if first not in self.memory and self.step > 0:
            self.memory[first] = spectrum.right_NK.float().cpu()
        if first in self.memory:
            numbers["sim"] = similarity(_wide(self.memory[first], now), spectrum.right_NK), 1.0
        return numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """All singular values of a matrix [M, N], largest first, and its first K singular vectors, as far as they are not
    rounding."""

    values: Tensor
    left_MK: Tensor
    right_NK: Tensor

    @classmethod
    def of(cls, x_MN: Tensor, directions: int) -> Spectrum:
        if x_MN.shape[0] > x_MN.shape[1]:
            turned = cls.of(x_MN.t(), directions)
            return cls(values=turned.values, left_MK=turned.right_NK, right_NK=turned.left_MK)
        squares, vectors = torch.linalg.eigh(x_MN @ x_MN.t())
        values = squares.flip(0).clamp_min(0.0).sqrt()
        rank = int((values > _NOTHING * values[0]).sum()) if len(values) else 0
        left_MK = vectors.flip(1)[:, : min(directions, rank)]
        return cls(values=values, left_MK=left_MK, right_NK=torch.linalg.qr(x_MN.t() @ left_MK).Q)


def angle(a_NK: Tensor, b_NK: Tensor) -> float:
    """The largest principal angle between two spaces, in degrees, from bases whose columns are orthonormal."""
    if not min(a_NK.shape[1], b_NK.shape[1]):
        return 0.0
    if a_NK.shape[1] > b_NK.shape[1]:
        a_NK, b_NK = b_NK, a_NK
    # By the sine: the cosine of a small angle is 1.
    sine = torch.linalg.matrix_norm(a_NK - b_NK @ (b_NK.t() @ a_NK), 2)
    return math.degrees(math.asin(min(float(sine), 1.0)))


def similarity(a_NK: Tensor, b_NK: Tensor) -> float:
    """|A^T B|_F^2 / K, K the number of columns of the narrower one: 1 if its space lies in the other's."""
    return float((a_NK.t() @ b_NK).square().sum()) / max(min(a_NK.shape[1], b_NK.shape[1]), 1)


@dataclass(frozen=True, eq=False)
class _Trained:
    """A matrix that is trained itself."""

    name: str
    parameter: Tensor

    def start(self) -> Tensor:
        return self.parameter.detach().cpu().clone()

    def now(self, weights: Mapping[str, Weight]) -> Tensor:
        return weights[self.name].whole()


@dataclass(frozen=True, eq=False)
class _Adapted:
    """A matrix with an adapter added."""

    path: str
    module: Any
    adapter: str

    def start(self) -> Tensor:
        a, b = (getattr(self.module, which)[self.adapter].weight for which in ("lora_A", "lora_B"))
        return self._added(a, b).cpu()

    def now(self, weights: Mapping[str, Weight]) -> Tensor:
        return self._added(
            *(weights[f"{self.path}.{which}.{self.adapter}.weight"].whole() for which in ("lora_A", "lora_B"))
        )

    def _added(self, a: Tensor, b: Tensor) -> Tensor:
        base, scale = self.module.base_layer.weight, self.module.scaling[self.adapter]
        return base.detach().float() + scale * (b.detach().float() @ a.detach().float())


def _matrices(student: nn.Module) -> dict[str, _Trained | _Adapted]:
    """All trained matrices but embeddings and head, by name."""
    inside: Any = causal_lm_of(student)
    outside = (inside.get_input_embeddings(), inside.get_output_embeddings())
    found: dict[str, _Trained | _Adapted] = {}
    for path, module in student.named_modules():
        weight = getattr(module, "weight", None)
        apart = any(module is other for other in outside) or "lora_" in path  # factors of an adapter
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            adapters: Any = module.lora_A
            for adapter in adapters:
                found[f"{path.removeprefix('base_model.model.')}.weight"] = _Adapted(path, module, adapter)
        elif isinstance(weight, nn.Parameter) and weight.dim() == 2 and weight.requires_grad and not apart:
            found[f"{path}.weight"] = _Trained(f"{path}.weight", weight)
    return found


def _chosen(every: Mapping[str, _Trained | _Adapted], matrices: int | Sequence[str]) -> list[str]:
    names = list(every)
    if not names:
        raise ConfigError("probe 'change' watches matrices, and the student trains none. Leave the probe out.")
    if isinstance(matrices, int):
        number = min(matrices, len(names))
        return [names[(2 * i + 1) * len(names) // (2 * number)] for i in range(number)]
    for pattern in matrices:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"probe 'change' has the pattern {pattern!r} in matrices, but of {len(names)} trained matrices none "
                f"has such a name. They are called {names[0]}, ..., {names[-1]}."
            )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in matrices)]


def _wide(x: Tensor, like: Tensor) -> Tensor:
    """In float64, where the device has that."""
    device = torch.device("cpu") if like.device.type == "mps" else like.device
    return x.detach().to(device).double()
