"""Identities between methods: each is a special case of another, exactly."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.objective.cases import F64, Case, K, V, close, gradient_of, make_case, pair
from tropd.methods import (
    AOPD,
    GKD,
    JSD,
    OPD,
    REOPOLD,
    TOPD,
    ClipOutlier,
    FullFKL,
    ManyFaces,
    MaskOutlier,
    MiniLLM,
    TrOPD,
    TrOPDPlusAOPD,
)
from tropd.objective import ForwardKL, JensenShannon, Objective, PolicyGradient, ReverseKL, Term
from tropd.objective.context import Context
from tropd.objective.rewards import Clip, LogRatio, ProximalTeacher, chain
from tropd.objective.selectors import STUDENT, TrustRegion
from tropd.types import Author


@pytest.fixture
def case() -> Case:
    return make_case()


@pytest.fixture
def student_case() -> Case:
    """No teacher-written token: denominators over actions and over the student's tokens agree."""
    case = make_case(4)
    authors = torch.full_like(case.tokens.authors_N, int(Author.STUDENT))
    num = torch.bincount(case.tokens.sequences_N)
    return dataclasses.replace(case, tokens=case.tokens.with_(authors_N=authors, num_actions_S=num))


def test_aopd_below_every_gap_is_opd(student_case):
    close(
        student_case.gradient(AOPD(tau=-1.0, top_k=K, denominator="actions").objective),
        student_case.gradient(OPD().objective),
    )


def test_aopd_above_every_gap_is_full_forward_kl(student_case):
    close(
        student_case.gradient(AOPD(tau=1.0, top_k=K, denominator="actions").objective),
        student_case.gradient(FullFKL(top_k=K).objective),
    )


def test_tropd_that_trusts_everything_without_prefixes_is_opd(case):
    everything = TrOPD(trust="threshold", trust_threshold=1e-300, guidance=False, top_k=K)
    close(case.gradient(everything.objective), case.gradient(OPD().objective))


def test_tropd_with_beta_zero_that_trusts_everything_is_opd(case):
    everything = TrOPD(trust="threshold", trust_threshold=1e-300, beta=0.0, top_k=K)
    close(case.gradient(everything.objective), case.gradient(OPD().objective))


def test_tropd_that_trusts_nothing_is_full_forward_kl(case):
    """A teacher that gives every written token no probability leaves outliers only."""
    tokens = case.tokens.with_(teacher_logprobs_N=torch.full_like(case.tokens.teacher_logprobs_N, -torch.inf))
    distrusted = dataclasses.replace(case, tokens=tokens)
    for trust in ("bernoulli", "threshold", "soft"):
        nothing = TrOPD(trust=trust, guidance=False, top_k=K)
        close(distrusted.gradient(nothing.objective), case.gradient(FullFKL(top_k=K).objective))


def test_tropd_threshold_at_one_is_aopd_without_prefixes(student_case):
    """pi_T >= pi_S against pi_T > pi_S: the same wherever the two differ at all."""
    threshold = TrOPD(trust="threshold", trust_threshold=1.0, guidance=False, top_k=K)
    close(
        student_case.gradient(threshold.objective),
        student_case.gradient(AOPD(top_k=K, denominator="actions").objective),
    )


def test_or_of_the_gates_is_aopd_under_tropds_prefixes(case):
    both = TrOPDPlusAOPD(reading="R3", tropd=TrOPD(top_k=K, beta=0.0))
    student_only = Objective(*[t for t in both.objective.terms if t.name != "guidance"])
    close(case.gradient(student_only), case.gradient(AOPD(top_k=K, denominator="actions").objective))


def test_the_first_reading_of_tropd_plus_aopd_doubles_positive_rewards(case):
    plain, doubled = TrOPD(top_k=K), TrOPDPlusAOPD(reading="R1", tropd=TrOPD(top_k=K))
    positive = (case.tokens.log_ratio_N > 0) & (case.tokens.authors_N == Author.STUDENT)
    extra = case.gradient(doubled.objective) - case.gradient(plain.objective)
    close(extra[positive], case.gradient(OPD().objective)[positive])
    assert float(extra[~positive].abs().max()) == 0


def test_the_proximal_teacher_at_one_is_opd(case):
    close(case.gradient(TOPD(alpha=1.0).objective), case.gradient(OPD().objective))


def test_a_floor_at_minus_infinity_is_opd(case):
    close(case.gradient(ClipOutlier(floor=-math.inf).objective), case.gradient(OPD().objective))
    close(case.gradient(MaskOutlier(floor=-math.inf).objective), case.gradient(OPD().objective))


def test_reopolds_floor_is_the_lower_envelope_of_the_proximal_reward(case):
    mixture = 0.1
    zero, context = torch.zeros(len(case.tokens), dtype=F64), Context()
    proximal = chain(LogRatio(), ProximalTeacher(1 - mixture))(zero, case.tokens, context)
    floor = REOPOLD(mixture=mixture).smallest_reward
    floored = chain(LogRatio(), Clip(low=floor))(zero, case.tokens, context)
    assert bool((proximal >= (1 - mixture) * floored - 1e-12).all())
    assert floor == pytest.approx(-2.558, abs=1e-3)


def test_one_stage_reopold_is_clipping(case):
    floor = REOPOLD().smallest_reward
    close(case.gradient(REOPOLD(stages=1).objective), case.gradient(ClipOutlier(floor=floor).objective))


@pytest.mark.parametrize("support", ["teacher_top_k", "student_top_k", "union", "intersection"])
@pytest.mark.parametrize("outside", ["ignore", "stop_gradient", "generalised", "bucket", "renormalise"])
def test_every_support_and_correction_is_the_full_divergence_at_the_whole_vocabulary(support, outside):
    case = make_case(top_k=V)
    loss = ReverseKL(support=support, top_k=V, outside=outside)
    full = Objective(Term("full", STUDENT, ReverseKL()))
    close(case.gradient(Objective(Term("top", STUDENT, loss))), case.gradient(full))


@pytest.mark.parametrize("outside", ["ignore", "generalised", "bucket", "renormalise", "renormalise_teacher"])
def test_forward_kl_on_the_whole_vocabulary_is_the_full_divergence(outside):
    case = make_case(top_k=V)
    loss = ForwardKL(support="teacher_top_k", top_k=V, outside=outside)
    close(
        case.gradient(Objective(Term("top", STUDENT, loss))),
        case.gradient(Objective(Term("full", STUDENT, ForwardKL()))),
    )


def test_scaled_jensen_shannon_tends_to_the_two_kls():
    s, t = pair()
    js = {b: gradient_of(lambda x, b=b: JensenShannon(beta=b).between(t, x), s) for b in (1e-7, 1 - 1e-7)}
    close(js[1e-7] / 1e-7, gradient_of(lambda x: ForwardKL().between(t, x), s), 1e-5)
    close(js[1 - 1e-7] / 1e-7, gradient_of(lambda x: ReverseKL().between(t, x), s), 1e-5)


def test_k2_is_opd_on_the_first_step(case):
    close(case.gradient(OPD(estimator="k2").objective), case.gradient(OPD().objective))


def test_minillm_without_future_and_single_step_is_opd(case):
    plain = MiniLLM(discount=0.0, length_normalised=False, standardised=False, single_step=False, ratio_clip=None)
    close(case.gradient(plain.objective), case.gradient(OPD().objective))


def test_opd_without_discount_is_the_limit_of_small_discounts(case):
    close(case.gradient(OPD(discount=1e-9).objective), case.gradient(OPD().objective), 1e-8)


@pytest.mark.filterwarnings("ignore::tropd.errors.MethodWarning")
def test_gkd_at_its_ends_is_the_two_kls(case):
    everywhere = STUDENT | ~STUDENT
    for beta, loss in ((0.0, ForwardKL()), (1.0, ReverseKL())):
        close(case.gradient(GKD(beta=beta).objective), case.gradient(Objective(Term("kl", everywhere, loss))))


def test_the_jensen_shannon_row_is_the_true_divergence_in_expectation():
    """With the whole vocabulary as support, both parts together are JS against a frozen mixture's reverse part."""
    from tests.objective.cases import expected_gradient

    s, t = pair()
    forward, reverse = (term.loss for term in JSD(top_k=V, beta=0.3).objective.terms)
    frozen = s.detach().log_softmax(-1)
    log_m = (0.3 * t.exp() + 0.7 * frozen.exp()).log()
    exact = gradient_of(lambda x: (x.exp() * (x - log_m)).sum(), s)
    close(expected_gradient(reverse, s, t, top_k=V), exact)
    skewed = gradient_of(lambda x: (t.exp() * (t - (0.3 * t.exp() + 0.7 * x.exp()).log())).sum(), s)
    close(expected_gradient(forward, s, t, top_k=V), skewed)


def test_trust_and_its_complement_are_a_partition(case):
    for rule in ("bernoulli", "threshold", "soft"):
        trusted = TrustRegion(rule)
        total = trusted(case.tokens, Context()) + (~trusted)(case.tokens, Context())
        close(total, torch.ones_like(total), 0)


def test_importance_weights_make_an_old_rollout_unbiased():
    """Tokens drawn from another policy mu, weighted by pi_S / mu, give the gradient at pi_S."""
    from tests.objective.cases import one_state, reverse_kl

    s, t = pair()
    mu, _ = pair(9)
    log_mu = mu.detach().log_softmax(-1)
    case = one_state(s, t)
    tokens = case.tokens.with_(behavior_logprobs_N=log_mu)
    objective = Objective(Term("t", STUDENT, PolicyGradient(LogRatio())))
    plan = objective.plan(tokens)
    plan.weights["t"].mul_(V * log_mu.exp())
    gradient = torch.autograd.grad(objective(tokens, case.view(), plan).loss, s)[0]
    close(gradient, gradient_of(reverse_kl(t), s))


def test_many_faces_stop_gradient_and_generalised_agree(case):
    a, b = (ManyFaces(outside=o, top_k=K).objective for o in ("stop_gradient", "generalised"))
    close(case.gradient(a), case.gradient(b))
