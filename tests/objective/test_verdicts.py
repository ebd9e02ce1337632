"""Gates by the grader and reshaped rewards: expectations by enumerating the vocabulary, and limits that are OPD."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.objective.cases import (
    F64,
    Case,
    V,
    close,
    expected_gradient,
    gradient_of,
    make_case,
    one_state,
    pair,
    reverse_kl,
)
from tropd.methods import GNDPO, KDRL, OPD, OPDVR, RGOPD, SGOPD, VOPD, ExOPD, PowerOPD, TrOPD
from tropd.methods.exopd import Extrapolated
from tropd.methods.gndpo import Whitened
from tropd.methods.rg_opd import VerdictGated
from tropd.methods.sg_opd import SignExtrapolated, SignGated
from tropd.methods.vopd import KLBaseline
from tropd.objective import Context, Objective, PolicyGradient, Reward, Term
from tropd.objective.evidence import Needs
from tropd.objective.examples import some_tokens
from tropd.objective.power import PowerDifference
from tropd.objective.rewards import Clip, GroupAdvantage, LogRatio, ReverseKLBaseline, Standardise, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.verdicts import SignExtrapolation, SignGate, VerdictsAgree
from tropd.types import Author


def enumerated(reward_V: Tensor, s: Tensor) -> Tensor:
    """- sum_v pi_S(v) reward(v) grad log pi_S(v), from the definition."""
    log_s = s.log_softmax(-1)
    return torch.autograd.grad(-(log_s.detach().exp() * reward_V * log_s).sum(), s)[0]


def told(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By token, at one state: the log-ratio, that of the teacher to the start, and which responses passed."""
    tokens = one_state(s, t).tokens
    start_V = tokens.of("start").teacher_logprobs_N
    return tokens.log_ratio_N, tokens.teacher_logprobs_N - start_V, tokens.rewards_S > 0


@pytest.mark.parametrize("seed", range(3))
def test_each_gated_reward_has_the_gradient_of_its_definition(seed: int) -> None:
    s, t = pair(seed)
    ratio_V, delta_V, passed_V = told(s, t)
    agrees_V = (ratio_V > 0) == passed_V
    assert 2 <= int(agrees_V.sum()) <= V - 2
    expected: dict[Reward, Tensor] = {
        SignGate(): torch.where(passed_V, ratio_V.clamp_min(0), ratio_V.clamp_max(0)),
        SignGate(above=2.0): ratio_V.clamp_max(0),
        SignExtrapolation(): ratio_V + 0.8 * delta_V * agrees_V,
        SignExtrapolation(1.5, 0.25): ratio_V + torch.where(agrees_V, 0.5, -0.75) * delta_V,
    }
    for gate, reward_V in expected.items():
        close(expected_gradient(PolicyGradient(chain(LogRatio(), gate)), s, t), enumerated(reward_V, s), 1e-12)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.4, 1.25, 3.0])
def test_exopd_has_the_gradient_of_reverse_kl_to_the_extrapolated_teacher(scale: float) -> None:
    s, t = pair()
    _, delta_V, _ = told(s, t)
    beyond = (t + (scale - 1.0) * delta_V).log_softmax(-1)
    (term,) = ExOPD(scale=scale).objective.terms
    close(expected_gradient(term.loss, s, t), gradient_of(reverse_kl(beyond), s))


def power_divergence(t: Tensor, alpha: float):
    """The density power divergence of Basu and others, times alpha / (1 + alpha)."""

    def between(log_s: Tensor) -> Tensor:
        s, q = log_s.exp(), t.exp()
        terms = s ** (1 + alpha) / (1 + alpha) - s * q**alpha + alpha / (1 + alpha) * q ** (1 + alpha)
        return terms.sum()

    return between


@pytest.mark.parametrize("alpha", [0.1, 1.0, 5.0])
def test_the_power_reward_has_the_gradient_of_a_density_power_divergence(alpha: float) -> None:
    for seed in range(3):
        s, t = pair(seed)
        reward_V = t.exp() ** alpha - s.detach().softmax(-1) ** alpha
        found = expected_gradient(PolicyGradient(PowerDifference(alpha)), s, t)
        close(found, enumerated(reward_V, s), 1e-12)
        close(found, gradient_of(power_divergence(t, alpha), s), 1e-12)
        assert float(power_divergence(t, alpha)(s.log_softmax(-1).detach())) > 0


@pytest.mark.parametrize(("alpha", "rate"), [(0.1, 100.0), (1.0, 60.0), (2.0, 200.0)])
def test_the_fixed_point_of_the_power_reward_is_the_teacher(alpha: float, rate: float) -> None:
    z, t = pair(sharp=0.2)
    there = t.clone().requires_grad_()
    close(expected_gradient(PolicyGradient(PowerDifference(alpha)), there, t), torch.zeros_like(t), 1e-15)
    for _ in range(500):
        z = (z - rate * gradient_of(power_divergence(t, alpha), z)).detach().requires_grad_()
    close(z.detach().softmax(-1), t.exp(), 1e-6)


def test_a_small_power_is_opd_with_small_rewards() -> None:
    case, alpha = make_case(), 1e-6
    close(case.gradient(PowerOPD(alpha=alpha).objective) / alpha, case.gradient(OPD().objective), 1e-5)


def test_a_power_reward_is_bounded_whatever_the_teacher_thinks() -> None:
    tokens = some_tokens(student_logprobs_N=[-0.001, -9.0, -2.0], teacher_logprobs_N=[-torch.inf, 0.0, -2.0])
    found_N = PowerDifference(2.0)(torch.zeros(3), tokens, Context())
    assert bool((found_N.abs() <= 1).all()) and found_N.sign().tolist() == [-1, 1, 0]


def test_whitening_without_a_clamp_leaves_the_direction_of_the_expected_gradient() -> None:
    s, t = pair(sharp=2.0)
    ratio_V = told(s, t)[0]
    exact = gradient_of(reverse_kl(t), s)
    whitened = expected_gradient(PolicyGradient(chain(LogRatio(), Standardise())), s, t)
    close(whitened * ratio_V.std(correction=0), exact)
    clamped = expected_gradient(PolicyGradient(chain(LogRatio(), Clip(-0.5, 0.5), Standardise())), s, t)
    assert float(torch.cosine_similarity(clamped, exact, 0)) < 0.99


def test_the_mean_of_the_batch_scales_the_expected_gradient_by_the_share_of_the_others() -> None:
    """Over all batches of two tokens: each token's own reward is half of the mean that is subtracted from it."""
    s, t = pair()
    log_s, ratio_V = s.log_softmax(-1), told(s, t)[0]
    loss = torch.zeros((), dtype=F64)
    for v in range(V):
        for w in range(V):
            drawn = torch.tensor([v, w])
            tokens = some_tokens(token_ids_N=drawn, sequences_N=[0, 1])
            reward = Standardise(divide=False)(ratio_V[drawn], tokens, Context())
            loss = loss - log_s[drawn].detach().sum().exp() * (reward * log_s[drawn]).mean()
    close(torch.autograd.grad(loss, s)[0], 0.5 * gradient_of(reverse_kl(t), s))


def test_a_baseline_of_reverse_kl_leaves_the_expected_gradient_and_lowers_its_variance() -> None:
    s, t = pair()
    (term,) = VOPD().objective.terms
    close(expected_gradient(term.loss, s, t), gradient_of(reverse_kl(t), s))
    ratio_V, p_V = told(s, t)[0], s.detach().softmax(-1)
    reward_V = chain(LogRatio(), ReverseKLBaseline())(torch.zeros(V, dtype=F64), one_state(s, t).tokens, Context())
    close((p_V * reward_V).sum(), torch.zeros((), dtype=F64))
    assert float((p_V * reward_V**2).sum()) < float((p_V * ratio_V**2).sum())


def test_an_infinite_divergence_is_no_baseline() -> None:
    tokens = some_tokens(
        student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-1.0, -1.0], reverse_kl_N=[torch.inf, 0.2]
    )
    found_N = chain(LogRatio(), ReverseKLBaseline())(torch.zeros(2), tokens, Context())
    close(found_N, torch.tensor([-0.5, -0.3]), 1e-7)


@pytest.fixture
def case() -> Case:
    return make_case()


@pytest.mark.parametrize(
    "method", [SGOPD(agree=1.0, conflict=1.0, beta=0.0), ExOPD(scale=1.0)], ids=lambda method: method.name
)
def test_a_factor_of_1_is_opd_bit_for_bit(case: Case, method) -> None:
    assert torch.equal(case.gradient(method.objective), case.gradient(OPD().objective))


def test_exopd_at_a_factor_of_1_reads_no_reference() -> None:
    assert ExOPD(scale=1.0).objective == OPD().objective and ExOPD(scale=1.0).readers == {}
    assert ExOPD().objective.readers == ("start", "teacher") and set(ExOPD().readers) == {"start"}
    assert ExOPD(reference="base").objective.readers == ("base", "teacher") and ExOPD(reference="base").readers == {}


def test_sg_opd_that_extrapolates_everywhere_is_exopd(case: Case) -> None:
    both = SGOPD(agree=1.25, conflict=1.25, beta=0.0).objective
    close(case.gradient(both), case.gradient(ExOPD().objective), 1e-15)


def test_a_gate_adds_nothing_where_the_reference_cannot_write_the_token_unless_it_counts() -> None:
    tokens = some_tokens(teacher_logprobs_N=[-1.0, -1.0], sequences_N=[0, 1], rewards_S=[1.0, 0.0])
    tokens = tokens.told("start", teacher_logprobs_N=torch.tensor([-torch.inf, -torch.inf]))
    found_N = SignExtrapolation(agree=1.8, conflict=1.0)(torch.ones(2), tokens, Context())
    assert found_N.tolist() == [torch.inf, 1.0], "the plan refuses what is not finite and names the token"


def test_a_reward_of_zero_agrees_with_nobody() -> None:
    tokens = some_tokens(teacher_logprobs_N=[-1.0, -1.0], sequences_N=[0, 1], rewards_S=[1.0, 0.0])
    tokens = tokens.told("start", teacher_logprobs_N=torch.tensor([-2.0, -2.0]))
    zero_N = torch.zeros(2)
    assert SignExtrapolation(agree=9.0)(zero_N, tokens, Context()).tolist() == [0.0, 0.0]
    assert SignGate()(zero_N, tokens, Context()).tolist() == [0.0, 0.0]


def test_opdvr_keeps_both_signs_apart_by_the_grader(case: Case) -> None:
    plan, plain = (m.objective.plan(case.tokens) for m in (OPDVR(), OPD()))
    reward_N, ratio_N = plan.rewards["reverse_kl"], plain.rewards["reverse_kl"]
    passed_N = case.tokens.rewards_S[case.tokens.sequences_N] > 0
    assert bool((reward_N[passed_N] >= 0).all()) and bool((reward_N[~passed_N] <= 0).all())
    kept_N = reward_N != 0
    assert torch.equal(reward_N[kept_N], ratio_N[kept_N]) and 0 < int(kept_N.sum()) < int((ratio_N != 0).sum())
    assert torch.equal(plan.weights["reverse_kl"], plain.weights["reverse_kl"])


def test_rg_opd_keeps_responses_whose_summed_reward_has_the_graders_sign() -> None:
    tokens = some_tokens(
        student_logprobs_N=[-1.0] * 7,
        teacher_logprobs_N=[-0.5, -1.2, -3.0, -0.9, -1.0, -9.0, -0.5],
        sequences_N=[0, 0, 1, 1, 2, 3, 3],
        authors_N=[1, 1, 1, 1, 1, 2, 1],
        rewards_S=[1.0, 0.0, 1.0, 1.0],
    )
    assert VerdictsAgree()(tokens, Context()).tolist() == [1, 1, 1, 1, 0, 0, 1], "sums 0.3, -1.9, 0 and 0.5"
    assert VerdictsAgree(above=1.0)(tokens, Context()).tolist() == [0, 0, 1, 1, 0, 0, 0]
    plan = RGOPD().objective.plan(tokens)
    close(plan.weights["reverse_kl"], torch.tensor([1.0, 1, 1, 1, 0, 0, 1]) / 7)


def test_a_response_that_the_teacher_cannot_write_is_one_that_it_rejects() -> None:
    tokens = some_tokens(
        student_logprobs_N=[-1.0, -9.0], teacher_logprobs_N=[-torch.inf, -0.1], sequences_N=[0, 0], rewards_S=[1.0]
    )
    assert VerdictsAgree()(tokens, Context()).tolist() == [0, 0]


def test_gndpo_without_clamp_is_opd_standardised(case: Case) -> None:
    wide, reward = GNDPO(clamp=1e6), chain(LogRatio(), Standardise())
    same = Objective(Term("reverse_kl", STUDENT, PolicyGradient(reward, clip=0.2)))
    assert torch.equal(case.gradient(wide.objective), case.gradient(same))
    reward_N = GNDPO().objective.plan(case.tokens).rewards["reverse_kl"][case.tokens.authors_N == Author.STUDENT]
    close(reward_N.mean(), torch.zeros((), dtype=F64), 1e-12)
    close(reward_N.std(correction=0), torch.ones((), dtype=F64), 1e-12)


def test_kdrl_is_grpo_and_opd_with_their_weights(case: Case) -> None:
    grpo = Objective(Term("grpo", STUDENT, PolicyGradient(GroupAdvantage(divide=True), clip=0.2)))
    opd, u = case.gradient(OPD().objective), 0.25
    for estimator in ("k2", "reward"):
        found = case.gradient(KDRL(estimator=estimator).objective, progress=u)
        close(found, case.gradient(grpo) + (5e-3 - u * 4e-3) * opd, 1e-12)
    one_by_one = KDRL(distil_first=0.3).objective
    close(case.gradient(one_by_one, progress=0.2), opd, 1e-12)
    close(case.gradient(one_by_one, progress=0.3), case.gradient(grpo), 1e-15)


def test_kdrl_on_failures_distils_these_alone(case: Case) -> None:
    weights = KDRL(distil="failures").objective.plan(case.tokens).weights
    failed_N = case.tokens.rewards_S[case.tokens.sequences_N] <= 0
    assert not weights["distil"][~failed_N].any() and bool(weights["distil"][failed_N].any())
    assert bool(weights["grpo"][~failed_N].any())


EXTRAS = {
    SignGated(): OPDVR(),
    SignExtrapolated(): SGOPD(beta=0.0),
    VerdictGated(): RGOPD(),
    KLBaseline(): VOPD(),
    Extrapolated(): ExOPD(),
    Whitened(): dataclasses.replace(GNDPO(), ratio_clip=1e6),
}


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda extra: extra.name)
def test_an_extra_on_opd_is_the_method_of_its_name(case: Case, extra) -> None:
    assert extra.name == EXTRAS[extra].name
    assert torch.equal(case.gradient(OPD(plus=(extra,)).objective), case.gradient(EXTRAS[extra].objective))
    on_tropd = TrOPD(top_k=4, plus=(extra,)).objective
    assert bool(torch.isfinite(case.gradient(on_tropd)).all())


@pytest.mark.parametrize("method", [SGOPD(), OPDVR(), RGOPD(), KDRL()], ids=lambda method: method.name)
def test_methods_that_ask_the_grader_say_so(method) -> None:
    assert Needs.REWARD in method.needs
