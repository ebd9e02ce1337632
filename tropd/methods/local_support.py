"""LSM, and the supports and corrections of "Many Faces": reverse KL on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.base.ranges import Count, PositiveShare, Whole
from tropd.methods.base import Method, warn
from tropd.objective.divergence import DivergenceLoss
from tropd.objective.losses import ForwardKL, JensenShannon, ReverseKL, StateReward
from tropd.objective.objective import Objective
from tropd.objective.places import FirstOf, TokenIn
from tropd.objective.selectors import STUDENT
from tropd.objective.support import Outside, Support
from tropd.objective.terms import Term
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class LSM(Method):
    r"""Teacher top-k local support matching: reverse KL, both sides renormalised
    on the teacher's top-k.

        sum_{v in top-k(pi_T)} p(v) log(p(v) / q(v))
        p, q = pi_S, pi_T renormalised there

    The loss has no force on mass outside the support; rollouts drawn with
    top_p < 1 are the other half of the method.
    """

    name: Literal["lsm"] = "lsm"
    top_k: Count = 32
    """Teacher support (paper: 32). At least 1."""
    top_p: PositiveShare = 0.9
    """Of the rollouts (paper: 0.9; 1.0 loses: 17.7 against 23.6 on AIME24). In (0, 1]."""
    special_ids: tuple[Whole, ...] = ()
    """Written tokens that teach nothing, such as end-of-turn tokens that the two models use differently (paper's
    special-token masking, off by default). Each at least 0."""
    special_tokens: tuple[str, ...] = ()
    """More of them by their text, each one token, such as <think>; eos_token is the tokenizer's own (paper: the parts
    of <think> and <|im_end|>)."""
    special_occurrences: Literal["first", "every"] = "first"
    """Which of these tokens: the first of each id in a response (paper and code), or every one of them."""

    paper = "2603.25562"
    summary = "renormalised reverse KL on the teacher's top-k, rollouts with top-p"
    idea = "whose distribution"
    readings = (
        "The paper's code masks the first occurrence of each special id in a response; later ones teach. Where an id "
        "should never teach, take special_occurrences = 'every'.",
    )

    @property
    def objective(self) -> Objective:
        special = FirstOf if self.special_occurrences == "first" else TokenIn
        named = self.special_ids or self.special_tokens
        where = STUDENT & ~special(self.special_ids, self.special_tokens) if named else STUDENT
        loss = ReverseKL(support="teacher_top_k", top_k=self.top_k, outside="renormalise")
        return Objective(Term("reverse_kl", where, loss))

    @property
    def sampling(self) -> Sampling:
        return Sampling(top_p=self.top_p)


@dataclass(frozen=True, kw_only=True)
class ManyFaces(Method):
    r"""A divergence on a small support, and what is done about the rest (The Many
    Faces of OPD).

        support  teacher_top_k, student_top_k, union, intersection, full,
                 difference: the union without the intersection
        outside  ignore         sum_A S log(S/T): biased, fixed point S/T = 1/e
                 stop_gradient  sum_A S (sg[log S] - log T)
                 generalised    sum_A S log(S/T) - S + T: the same gradient,
                                never negative
                 bucket         the rest of the vocabulary as one more token
                 renormalise    both sides sum to 1 on the support: shape right,
                                mass free
    """

    name: Literal["many_faces"] = "many_faces"
    divergence: Literal["reverse_kl", "forward_kl", "jensen_shannon"] = "reverse_kl"
    """Which divergence (paper: reverse KL); Jensen-Shannon's beta is 0.5."""
    path: Literal["direct", "reward"] = "direct"
    """Differentiated through the student, or used as a reward as in the code: its expected gradient is then zero
    (warns)."""
    support: Support = "student_top_k"
    """Whose likeliest tokens."""
    outside: Outside = "stop_gradient"
    """Treatment of the rest (paper's fix: stop-gradient)."""
    top_k: Count = 20
    """Support size (code: 20). At least 1."""

    paper = "2605.11182"
    summary = "reverse KL on a chosen top-k support with a chosen correction"
    idea = "whose distribution"
    readings = (
        "The code uses each sum as a reward for the token that was drawn, which tells no token from another; here it "
        "is differentiated, unless path = 'reward'.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.path == "reward":
            warn(
                "method 'many_faces' with path = 'reward': the reward does not depend on the drawn token, so its "
                "expected gradient is zero and training is noise. Use path = 'direct'."
            )
        if self.divergence == "reverse_kl" and self.outside == "ignore" and self.support != "full":
            warn(
                "outside = 'ignore' with reverse KL on a top-k support is no divergence: its fixed point is "
                "S/T = 1/e and it pushes probability out of the support. Use 'stop_gradient' or 'generalised'."
            )

    @property
    def objective(self) -> Objective:
        kinds = {"reverse_kl": ReverseKL, "forward_kl": ForwardKL, "jensen_shannon": JensenShannon}
        kind: type[DivergenceLoss] = kinds[self.divergence]
        loss = kind(support=self.support, top_k=self.top_k, outside=self.outside)
        return Objective(Term(self.divergence, STUDENT, StateReward(loss) if self.path == "reward" else loss))
