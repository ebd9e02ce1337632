"""What the examples in the docstrings of this folder use.  To try one, paste it after

from tropd.objective.examples import *
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tropd.objective.acceptance import Accepted, Rejected
from tropd.objective.agreement import Agreement, ContrastiveHinge
from tropd.objective.borrow import distillation_loss, positions_of
from tropd.objective.chunks import Audited, ChunkSupport, WeighedLikelihood
from tropd.objective.context import Context
from tropd.objective.controls import AtRandom, RandomWindow, Shuffled
from tropd.objective.evidence import StudentView, Tokens, around
from tropd.objective.handed import ReaderEvidence
from tropd.objective.hidden import HiddenMatch
from tropd.objective.lookahead import LookaheadBonus
from tropd.objective.losses import (
    AtMost,
    ForwardKL,
    ImportanceWeighted,
    JensenShannon,
    NegativeLogLikelihood,
    PolicyGradient,
    ReverseKL,
    SampledForwardKL,
    SampledReverseKL,
    StateReward,
)
from tropd.objective.measures import EitherHigh, Normalised, ReverseKLAt, StudentEntropy
from tropd.objective.memory import Memory
from tropd.objective.near_future import FalseAlarm, FutureGap, HighLoss
from tropd.objective.objective import Objective
from tropd.objective.places import FirstOf, LastPositions, Near, PositionBelow, ShorterThan, Shortest, TokenIn
from tropd.objective.power import PowerDifference
from tropd.objective.rewards import (
    Clip,
    DivergenceWeight,
    FutureSum,
    GroupAdvantage,
    LogRatio,
    PlusFutureMean,
    ProximalTeacher,
    ReverseKLBaseline,
    Scale,
    Standardise,
    chain,
)
from tropd.objective.schedules import Schedule
from tropd.objective.selectors import (
    STUDENT,
    TEACHER,
    Everywhere,
    FromProgress,
    LogRatioAbove,
    PerplexityWeight,
    ProbabilityGapAbove,
    TeacherEntropyAbove,
    TopFraction,
    TrustRegion,
    Verified,
)
from tropd.objective.support_gradient import SupportGradient
from tropd.objective.targets import GeometricBridge, Temperature
from tropd.objective.teachability import Teachability, TeacherMassOnStudent, UnionForwardKL
from tropd.objective.terms import Term
from tropd.objective.trajectories import BestResponses, EntropyWeight, TeacherLogprob
from tropd.objective.trap import BeforeTrap, Trap, smoothed
from tropd.objective.verdicts import SignExtrapolation, SignGate, VerdictsAgree
from tropd.types import Author, key_of

__all__ = [
    "STUDENT",
    "TEACHER",
    "Accepted",
    "Agreement",
    "AtMost",
    "AtRandom",
    "Audited",
    "Author",
    "BeforeTrap",
    "BestResponses",
    "ChunkSupport",
    "Clip",
    "Context",
    "ContrastiveHinge",
    "DivergenceWeight",
    "EitherHigh",
    "EntropyWeight",
    "Everywhere",
    "FalseAlarm",
    "FirstOf",
    "ForwardKL",
    "FromProgress",
    "FutureGap",
    "FutureSum",
    "GeometricBridge",
    "GroupAdvantage",
    "HiddenMatch",
    "HighLoss",
    "ImportanceWeighted",
    "JensenShannon",
    "LastPositions",
    "LogRatio",
    "LogRatioAbove",
    "LookaheadBonus",
    "Memory",
    "Near",
    "NegativeLogLikelihood",
    "Normalised",
    "Objective",
    "PerplexityWeight",
    "PlusFutureMean",
    "PolicyGradient",
    "PositionBelow",
    "PowerDifference",
    "ProbabilityGapAbove",
    "ProximalTeacher",
    "RandomWindow",
    "ReaderEvidence",
    "Rejected",
    "ReverseKL",
    "ReverseKLAt",
    "ReverseKLBaseline",
    "SampledForwardKL",
    "SampledReverseKL",
    "Scale",
    "Schedule",
    "ShorterThan",
    "Shortest",
    "Shuffled",
    "SignExtrapolation",
    "SignGate",
    "Standardise",
    "StateReward",
    "StudentEntropy",
    "StudentView",
    "SupportGradient",
    "Teachability",
    "TeacherEntropyAbove",
    "TeacherLogprob",
    "TeacherMassOnStudent",
    "Temperature",
    "Term",
    "TokenIn",
    "TopFraction",
    "Trap",
    "TrustRegion",
    "UnionForwardKL",
    "VerdictsAgree",
    "Verified",
    "WeighedLikelihood",
    "chain",
    "distillation_loss",
    "smoothed",
    "some_tokens",
    "torch",
]


def some_tokens(**fields: Any) -> Tokens:
    """A few tokens to try a piece on: give the fields of `Tokens` that the piece reads, as lists.

    Fields that are left out describe one response, written by the student on-policy.

    >>> tokens = some_tokens(student_logprobs_N=[-0.5, -2.0], teacher_logprobs_N=[-1.0, -1.0])
    >>> tokens.log_ratio_N
    tensor([-0.5000,  1.0000])
    """
    given: dict[str, Any] = {n: x if isinstance(x, Tensor | int) else torch.tensor(x) for n, x in fields.items()}
    length = next(len(x) for name, x in given.items() if "_N" in name)
    authors_N = given.setdefault("authors_N", torch.full((length,), int(Author.STUDENT)))
    sequences_N = given.setdefault("sequences_N", torch.zeros(length, dtype=torch.int64))
    num_sequences = int(sequences_N.max()) + 1
    num_before_N, num_after_N = around(sequences_N, authors_N)
    trained_N = (authors_N == Author.STUDENT) | (authors_N == Author.TEACHER)
    usual = {
        "token_ids_N": torch.arange(length),
        "positions_N": positions_of(sequences_N, authors_N != Author.CONTEXT),
        "keys_S": torch.tensor([key_of(0, number) for number in range(num_sequences)]),
        "num_actions_S": torch.bincount(sequences_N[trained_N], minlength=num_sequences),
        "num_before_N": num_before_N,
        "num_after_N": num_after_N,
        "behavior_logprobs_N": given.get("student_logprobs_N"),
    }
    return Tokens(**{**usual, **given})
