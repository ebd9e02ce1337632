"""SafeSteer: the student before training, with a direction added to one of its layers, on a few tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Finite, Whole
from tropd.briefings.reader import Direction, Reader
from tropd.methods.base import Method
from tropd.objective.losses import ReverseKL
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.support import Outside
from tropd.objective.terms import Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class SafeSteer(Method):
    r"""Reverse KL on a fixed set A of tokens to the student before training whose
    hidden states are shifted in a direction d, such as that of refusals.

        sum_{v in A} S(v) log(S(v) / T(v))
        T = pi_start with h + strength d after a layer,    S = pi
    """

    name: Literal["safesteer"] = "safesteer"
    direction: str = ""
    """A .safetensors or .npy file with d (paper: the mean of refused prompts' states minus that of the others)."""
    layer: Whole = 0
    """After which layer, counted from 0 (paper: chosen for each model). At least 0."""
    strength: Finite = 1.0
    """How far (paper: 1). Any finite number."""
    ids: tuple[Whole, ...] = ()
    """The set A (code: 50 tokens, voted among the 200 that steering raises most over 8 samples of 7 tokens); none is
    the whole vocabulary. Each at least 0."""
    outside: Outside = "ignore"
    """Treatment of the other tokens (code: none)."""

    paper = "2606.02530"
    summary = "reverse KL on a fixed set of tokens to the student before training, shifted in a direction"
    idea = "what teaches"
    readings = (
        "On a set of tokens the sum as the code has it does not vanish where both models agree: it takes probability "
        "away from the set. outside = 'generalised' or 'bucket' vanish there.",
        "Neither the direction nor the set is found here: both are made before the run, from a few prompts.",
    )

    @property
    def objective(self) -> Objective:
        return Objective(Term("reverse_kl", STUDENT, ReverseKL(ids=self.ids, outside=self.outside)))

    @property
    def readers(self) -> Mapping[str, Reader]:
        if not self.direction:
            return {"teacher": Reader(model="start")}
        shift = Direction(file=self.direction, layer=self.layer, strength=self.strength)
        return {"teacher": Reader(model="start", direction=shift)}

    def objections(self, sampling: Sampling) -> list[str]:
        if self.direction:
            return []
        return ["safesteer has no direction, so the teacher that it prescribes is the student: set method.direction."]
