"""KAT: nothing is learned where student and teacher have agreed for too long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tropd.methods.agreement_stop import AgreementStop
from tropd.methods.base import Method
from tropd.methods.extras import Choose
from tropd.methods.policies import OnPolicy, RolloutPolicy
from tropd.objective.losses import PolicyGradient
from tropd.objective.objective import Objective
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector, Term
from tropd.objective.trap import BeforeTrap, Trap


@dataclass(frozen=True, kw_only=True)
class KAT(Method):
    r"""Escaping the KL agreement trap: OPD that stops a response, or masks its
    rest, where the divergence stays low.

        z_t = mean of KL(pi_S || pi_T) over the last `window` tokens
        s   = quantile 1 - eta of the lowest z_t of earlier responses
        cut   where `streak` values in a row lie below s, at the first of them
    """

    name: Literal["kat"] = "kat"
    mode: Literal["mask", "online"] = "mask"
    """mask: whole responses are written, and the loss leaves out what follows the cut, with any kind of writer. online:
    the response ends there, which saves its tokens and needs the teacher in this process while it is written (paper:
    both; the default is what every writer can carry out)."""
    trap: Trap = Trap()
    """The rule (paper, except for the length of the exempt zone at the beginning, which is inferred)."""

    paper = "2606.09471"
    idea = "which tokens"
    summary = "OPD up to where student and teacher have agreed for too long"
    readings = (
        "The divergence is over the whole vocabulary; the paper's, on top-64 and a bucket, is within 0.5 % of it.",
        "Every response enters the queue, also one that was cut: without these only responses that never came near "
        "the threshold would set the next one.",
        "With eta = 0.3 the threshold lies above the lowest mean of 70 % of the responses, so about half of all "
        "responses are cut even where nothing is wrong: compare with random_window or with horizon at equal lengths.",
    )

    @property
    def objective(self) -> Objective:
        where = STUDENT & BeforeTrap(self.trap) if self.mode == "mask" else STUDENT
        return Objective(Term("reverse_kl", where, PolicyGradient()))

    @property
    def rollout(self) -> RolloutPolicy:
        return AgreementStop(trap=self.trap) if self.mode == "online" else OnPolicy()


@dataclass(frozen=True, kw_only=True)
class KATMask(Choose):
    """The student's tokens before the place where a response is lost in agreement."""

    name: Literal["kat"] = "kat"
    trap: Trap = Trap()
    """The rule (paper, except for the exempt zone)."""

    idea = "which tokens"
    summary = "leaves out what follows where student and teacher have agreed for too long (KAT)"

    @property
    def selector(self) -> Selector:
        return BeforeTrap(self.trap)
