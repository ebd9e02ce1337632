"""The algebra of on-policy distillation.  Imports torch and nothing else: use it inside any training loop."""

from tropd.objective.agreement import Agreement, ContrastiveHinge
from tropd.objective.borrow import distillation_loss
from tropd.objective.bridge import Bridge
from tropd.objective.chunks import Audited, ChunkSupport, WeighedLikelihood
from tropd.objective.context import Context, Reach
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.handed import ReaderEvidence
from tropd.objective.hidden import HiddenMatch
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
from tropd.objective.objective import LossOutput, Objective
from tropd.objective.plan import Counts, Plan
from tropd.objective.schedules import Schedule
from tropd.objective.terms import Reward, Selector, Term, TokenLoss

__all__ = [
    "Agreement",
    "AtMost",
    "Audited",
    "Bridge",
    "ChunkSupport",
    "Context",
    "ContrastiveHinge",
    "Counts",
    "ForwardKL",
    "HiddenMatch",
    "ImportanceWeighted",
    "JensenShannon",
    "LossOutput",
    "Needs",
    "NegativeLogLikelihood",
    "Objective",
    "Plan",
    "PolicyGradient",
    "Reach",
    "ReaderEvidence",
    "ReverseKL",
    "Reward",
    "SampledForwardKL",
    "SampledReverseKL",
    "Schedule",
    "Selector",
    "StateReward",
    "StudentView",
    "Term",
    "TokenLoss",
    "Tokens",
    "WeighedLikelihood",
    "distillation_loss",
]
