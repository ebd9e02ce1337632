"""Hidden states of both models, compared directly (OPRD, arXiv 2606.06021; UniSD, arXiv 2605.06597)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tropd.errors import ConfigError, EvidenceError
from tropd.objective.bridge import Bridge
from tropd.objective.evidence import Needs, StudentView, Tokens, at_least_float32
from tropd.objective.objective import Objective
from tropd.objective.terms import Term, TokenLoss

Layers = Literal["last", "all", "even", "odd"]
"""The last layer, after the norm that the head reads; every layer; the first, third, ...; the second, fourth, ..."""
STATES = "states_"
"""How the columns with the states of several layers [N, L, H] are named: states_all, states_even, states_odd."""


def layer_numbers(layers: Layers, num_layers: int) -> list[int]:
    """The chosen layers of a model, counted from 0."""
    every = range(num_layers)
    chosen = {"last": every[-1:], "all": every, "even": every[::2], "odd": every[1::2]}[layers]
    if not chosen:
        raise ConfigError(f"the {layers} layers of a model with {num_layers} were asked for. Use layers = 'all'.")
    return list(chosen)


def layer_map(num_student: int, num_teacher: int) -> list[int]:
    """For each of the student's layers the teacher's at the same share of its depth; a single one has the last."""
    if num_student == 1:
        return [num_teacher - 1]
    return torch.linspace(0, num_teacher - 1, num_student, dtype=torch.float64).round().long().tolist()


def reads_states(term: Term) -> bool:
    """Whether a term reads the student's hidden states, so that it cannot be computed from a tile of the head."""
    return Needs.STUDENT_HIDDEN in term.needs


def states_read(objective: Objective) -> tuple[str, ...]:
    """The columns of hidden states that are read, of readers and of the student."""
    pieces = [piece for term in objective.terms for piece in (term.where, term.loss)]
    return tuple(sorted({name for piece in pieces for _, name in piece.columns() if name.startswith(STATES)}))


@dataclass(frozen=True)
class HiddenMatch(TokenLoss):
    """The mean squared difference of both models' hidden states, over the width and over the layers.

        1/L sum_l 1/H |h_S^l - h_T^m(l)|^2,   h the states that predict the token

    The squared norm of the paper is H times that.  Between models of different depth m(l) is the layer at the same
    share of the depth.  `normalise`: the states are divided by their norms first, as released code once did; the loss
    is then at most 4 / H, so it needs a weight of 100 to 1000.  `bridge`: a file of a `Bridge`, through which models of
    different width are compared; H is its rank then.  The reader must be one model in this process.

    >>> tokens = some_tokens(teacher_logprobs_N=[-1.0], teacher_hidden_NH=[[1.0, 2.0]])
    >>> view = StudentView(logprobs_N=torch.tensor([-1.0]), hidden_NH=torch.tensor([[1.0, 4.0]]))
    >>> HiddenMatch()(tokens, view, None)
    tensor([2.])
    """

    layers: Layers = "last"
    normalise: bool = False
    bridge: str | None = None
    own_needs = Needs.HIDDEN | Needs.STUDENT_HIDDEN

    @property
    def own_columns(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.layers == "last" else (STATES + self.layers,)

    def __call__(self, tokens: Tokens, student: StudentView, reward_N: Tensor | None) -> Tensor:
        if self.layers == "last":
            student_NLH, teacher_NLH = student.hidden_NH[:, None], tokens.teacher_hidden_NH[:, None]
        else:
            (name,) = self.own_columns
            student_NLH, teacher_NLH = student.column(name), tokens.column(name)
        teacher_NLH = teacher_NLH[:, layer_map(student_NLH.shape[1], teacher_NLH.shape[1])]
        student_NLH, teacher_NLH = at_least_float32(student_NLH), at_least_float32(teacher_NLH)
        if self.bridge is not None:
            student_NLH, teacher_NLH = Bridge.load(self.bridge).cross(student_NLH, teacher_NLH)
        if student_NLH.shape[-1] != teacher_NLH.shape[-1]:
            raise EvidenceError(
                f"hidden states of {student_NLH.shape[-1]} and {teacher_NLH.shape[-1]} numbers were to be compared. "
                "Use a teacher as wide as the student, a `bridge`, or a loss of probabilities."
            )
        if self.normalise:
            student_NLH, teacher_NLH = (torch.nn.functional.normalize(x, dim=-1) for x in (student_NLH, teacher_NLH))
        return ((student_NLH - teacher_NLH) ** 2).mean((-2, -1))
