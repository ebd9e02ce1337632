"""A frozen bridge between hidden states of different widths (OPRD-Bridge, arXiv 2606.06021).

    teacher   B = the r directions in which its states vary most (principal components)
    student   W = argmin |(s - mean s) W - (t - mean t) B|^2, the best linear guess of them

Both are fitted once, before training, on states that both models have of the same tokens, and stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tropd.errors import ConfigError, EvidenceError


@dataclass(frozen=True, eq=False)
class Bridge:
    """Means and maps of each pair of layers, to `rank` numbers."""

    student_mean_LH: Tensor
    student_map_LHR: Tensor
    teacher_mean_LH: Tensor
    teacher_map_LHR: Tensor

    @classmethod
    def fit(cls, student_NLH: Tensor, teacher_NLH: Tensor, rank: int) -> Bridge:
        """From states of the same tokens and of layers that belong together, in float64."""
        student_LNH, teacher_LNH = (x.detach().double().transpose(0, 1) for x in (student_NLH, teacher_NLH))
        if not 1 <= rank <= min(teacher_LNH.shape[1:]):
            raise ConfigError(
                f"a bridge of rank {rank} was asked for, but there are {teacher_LNH.shape[1]} tokens with states of "
                f"{teacher_LNH.shape[2]} numbers. Give a rank that neither falls short of."
            )
        means = student_LNH.mean(1), teacher_LNH.mean(1)
        centred = [x - mean[:, None] for x, mean in zip((student_LNH, teacher_LNH), means, strict=True)]
        basis_LHR = torch.linalg.svd(centred[1], full_matrices=False).Vh[:, :rank].mT
        map_LHR = torch.linalg.pinv(centred[0]) @ (centred[1] @ basis_LHR)
        return cls(means[0], map_LHR, means[1], basis_LHR)

    def cross(self, student_NLH: Tensor, teacher_NLH: Tensor) -> tuple[Tensor, Tensor]:
        """Both as [N, L, rank]."""
        ends = (self.student_mean_LH, self.student_map_LHR), (self.teacher_mean_LH, self.teacher_map_LHR)
        for whose, states, (mean, _) in zip(("student", "teacher"), (student_NLH, teacher_NLH), ends, strict=True):
            if states.shape[1:] != mean.shape:
                raise EvidenceError(
                    f"the bridge was fitted for {tuple(mean.shape)} layers and numbers of the {whose}, which has "
                    f"{tuple(states.shape[1:])}. Fit it again."
                )
        student, teacher = (
            torch.einsum("nlh,lhr->nlr", x - mean.to(x), matrix.to(x))
            for x, (mean, matrix) in zip((student_NLH, teacher_NLH), ends, strict=True)
        )
        return student, teacher

    def save(self, path: Path | str) -> None:
        torch.save(vars(self), path)

    @staticmethod
    @cache
    def load(path: str) -> Bridge:
        try:
            return Bridge(**torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ConfigError(f"the bridge {path} cannot be read: {error}. Write it with `Bridge.save`.") from error
