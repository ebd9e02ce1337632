"""Where a paper, its code and other people's code differ, each reading is a knob that does what it says."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.objective.cases import Case, K, close, make_case
from tropd.methods import LSM, OPD, FullFKL, MiniLLM, TrOPD, TrOPDPlusAOPD
from tropd.objective import Context, LossOutput, Objective, PolicyGradient, Term
from tropd.objective.rewards import FutureSum, LogRatio, Standardise, chain
from tropd.objective.selectors import STUDENT
from tropd.types import Author


@pytest.fixture
def case() -> Case:
    return make_case()


def student(case: Case) -> torch.Tensor:
    return case.tokens.authors_N == Author.STUDENT


def test_lsm_masks_the_first_occurrence_of_each_special_id(case):
    """The paper's code; every occurrence is a choice."""
    ids_N = case.tokens.token_ids_N.clone()
    ids_N[:] = 0
    rows = student(case).nonzero().flatten().tolist()
    sequences = case.tokens.sequences_N.tolist()
    first = {}
    for n, row in enumerate(rows):
        ids_N[row] = 1 + n % 2
        first.setdefault((sequences[row], 1 + n % 2), row)
    special = dataclasses.replace(case, tokens=case.tokens.with_(token_ids_N=ids_N))
    weights = {o: LSM(top_k=K, special_ids=(1, 2), special_occurrences=o) for o in ("first", "every")}
    assert LSM(special_ids=(1, 2)) == LSM(special_ids=(1, 2), special_occurrences="first")
    masked = {o: m.objective.plan(special.tokens).weights["reverse_kl"] == 0 for o, m in weights.items()}
    assert set(rows) & set(masked["first"].nonzero().flatten().tolist()) == set(first.values())
    assert bool(masked["every"].all())
    assert len(first) < len(rows)


@pytest.mark.parametrize("trust", ["bernoulli", "threshold", "soft"])
def test_an_outliers_forward_kl_counts_twice_or_once(case, trust):
    """R2 adds guidance to TrOPD: at outliers that is the same loss again, unless it is left to trusted tokens."""
    tropd = TrOPD(top_k=K, trust=trust, trust_threshold=0.4, guidance=False)
    plain = case.gradient(tropd.objective)
    twice = case.gradient(TrOPDPlusAOPD(tropd=tropd).objective) - plain
    once = case.gradient(TrOPDPlusAOPD(tropd=tropd, guide_outliers=False).objective) - plain
    forward = case.gradient(FullFKL(top_k=K).objective)
    worse = (student(case) & (case.tokens.log_ratio_N <= 0)).double()
    trusted = tropd.objective.plan(case.tokens, Context(progress=0.3)).weights["trusted"]
    trusted = trusted / trusted.max()
    close(twice, worse[:, None] * forward)
    close(once, (worse * trusted)[:, None] * forward)
    assert float((twice - once).abs().max()) > 1e-3


def test_minillms_own_reward_counts_once_or_twice(case):
    """Twice: the sum of rewards begins at the token itself, as in the authors' code; the exact single step is added."""
    once, twice = (MiniLLM(own_reward=r, standardised=False, length_normalised=False) for r in ("once", "twice"))
    assert MiniLLM().own_reward == "once"
    difference = case.gradient(twice.objective) - case.gradient(once.objective)
    own = Objective(Term("own", STUDENT, PolicyGradient(LogRatio(), clip=0.2)))
    close(difference, case.gradient(own))
    code = chain(LogRatio(), FutureSum(1.0, current=True, mean=True), Standardise())
    assert MiniLLM(own_reward="twice").objective.terms[0].loss == PolicyGradient(code, clip=0.2)


def drifted(case: Case) -> Case:
    """A sampler whose log-probabilities differ from the trainer's, as two engines' do."""
    noise_N = 0.3 * torch.randn(len(case.tokens), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    behavior_N = case.tokens.student_logprobs_N - noise_N.abs()
    return dataclasses.replace(case, tokens=case.tokens.with_(behavior_logprobs_N=behavior_N))


def test_opd_rewards_with_the_trainers_or_the_samplers_log_probability(case):
    other, context = drifted(case), Context()
    gap_N = other.tokens.student_logprobs_N - other.tokens.behavior_logprobs_N
    trainer, sampler = (OPD(reward_logprobs=r).objective for r in ("trainer", "sampler"))
    assert OPD().objective == trainer
    rewards = [o.plan(other.tokens, context).rewards["reverse_kl"] for o in (trainer, sampler)]
    close(rewards[1] - rewards[0], torch.where(student(case), gap_N, 0.0))
    close(case.gradient(sampler), case.gradient(trainer))  # the same where the two agree
    discounted = OPD(discount=0.5, reward_logprobs="sampler").objective.plan(other.tokens, context)
    assert float((discounted.rewards["reverse_kl"] - rewards[1]).abs().max()) > 0.1


def test_a_clip_acts_only_where_the_policy_has_moved(case):
    """In the first update after a rollout the ratio is 1, and no clip changes anything."""
    plain, clipped = OPD().objective, OPD(ratio_clip=0.2).objective
    close(case.gradient(clipped), case.gradient(plain), 0.0)
    other = drifted(case)
    assert float((other.gradient(clipped) - other.gradient(plain)).abs().max()) > 1e-3
    assert isinstance(plain(other.tokens, other.view(), plain.plan(other.tokens)), LossOutput)
