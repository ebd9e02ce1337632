"""What each loss minimises, proved by enumerating the vocabulary in float64."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objective.cases import (
    F64,
    K,
    V,
    close,
    expected_gradient,
    forward_kl,
    gradient_of,
    make_case,
    one_state,
    pair,
    reverse_kl,
)
from tropd.objective import (
    ForwardKL,
    JensenShannon,
    PolicyGradient,
    ReverseKL,
    SampledForwardKL,
    SampledReverseKL,
    StateReward,
)
from tropd.objective.context import Context
from tropd.objective.draws import uniform
from tropd.objective.evidence import StudentView, Tokens
from tropd.objective.rewards import (
    Clip,
    DivergenceWeight,
    LogRatio,
    ProximalTeacher,
    ReverseKLBaseline,
    Scale,
    chain,
)
from tropd.objective.selectors import TrustRegion
from tropd.objective.terms import TokenLoss


@pytest.mark.parametrize("seed", range(5))
def test_the_log_ratio_reward_has_the_gradient_of_reverse_kl(seed):
    s, t = pair(seed)
    close(expected_gradient(PolicyGradient(LogRatio()), s, t), gradient_of(reverse_kl(t), s))


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.5, 1.0])
def test_the_proximal_reward_has_the_gradient_of_reverse_kl_to_a_frozen_mixture(alpha):
    s, t = pair()
    frozen = s.detach().log_softmax(-1)
    mixture = (alpha * t.exp() + (1 - alpha) * frozen.exp()).log()
    loss = PolicyGradient(chain(LogRatio(), ProximalTeacher(alpha)))
    close(expected_gradient(loss, s, t), gradient_of(reverse_kl(mixture), s))


def f_divergence(name):
    """E_S[f(u)] with u = T / S."""
    f = {
        "forward_kl": lambda u: u * u.log(),
        "reverse_kl": lambda u: -u.log(),
        "jensen_shannon": lambda u: 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log()),
    }[name]
    return lambda t: lambda s: (s.exp() * f((t - s).exp())).sum()


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_opd_plus_weights_have_the_gradient_of_their_divergence(name):
    s, t = pair()
    loss = PolicyGradient(chain(LogRatio(), DivergenceWeight(name)))
    close(expected_gradient(loss, s, t), gradient_of(f_divergence(name)(t), s))


def test_naive_forward_kl_and_jensen_shannon_advantages_point_the_wrong_way():
    worst = {"forward_kl": [], "jensen_shannon": []}
    for seed in range(10):
        s, t = pair(seed, sharp=2.0)
        for name, cosines in worst.items():
            naive = expected_gradient(PolicyGradient(chain(LogRatio(), DivergenceWeight(name, naive=True))), s, t)
            true = gradient_of(f_divergence(name)(t), s)
            cosines.append(float(torch.cosine_similarity(naive, true, 0)))
    assert max(worst["forward_kl"]) < -0.5
    assert min(worst["jensen_shannon"]) < 0


def test_the_naive_reverse_kl_advantage_differs_by_a_baseline_only():
    s, t = pair()
    naive = PolicyGradient(chain(LogRatio(), DivergenceWeight("reverse_kl", naive=True)))
    close(expected_gradient(naive, s, t), gradient_of(reverse_kl(t), s))


def test_a_baseline_that_ignores_the_drawn_token_changes_nothing():
    s, t = pair()
    centred = PolicyGradient(chain(LogRatio(), ReverseKLBaseline()))
    close(expected_gradient(centred, s, t), gradient_of(reverse_kl(t), s))


class _DirectLogRatio(TokenLoss):
    """The mistake that the API does not offer: log pi_S - log pi_T, differentiated."""

    def __call__(self, tokens: Tokens, student: StudentView, reward_N):
        return student.logprobs_N - tokens.teacher_logprobs_N

    def parts(self):
        return iter(())


def test_backpropagating_the_log_ratio_itself_teaches_nothing():
    s, t = pair()
    close(expected_gradient(_DirectLogRatio(), s, t), torch.zeros(V, dtype=F64))


def test_half_the_squared_log_ratio_has_the_gradient_of_reverse_kl():
    s, t = pair()
    close(expected_gradient(SampledReverseKL(), s, t), gradient_of(reverse_kl(t), s))


def test_the_k3_estimator_has_the_gradient_of_forward_kl():
    s, t = pair()
    gradient = expected_gradient(SampledForwardKL(), s, t)
    close(gradient, gradient_of(forward_kl(t), s))
    assert (gradient - gradient_of(reverse_kl(t), s)).abs().max() > 0.01


@pytest.mark.parametrize(
    "loss", [ForwardKL(), ReverseKL(), JensenShannon(), ForwardKL(support="teacher_top_k", top_k=K)]
)
def test_a_state_only_reward_has_zero_mean_gradient(loss):
    s, t = pair()
    close(expected_gradient(StateReward(loss), s, t), torch.zeros(V, dtype=F64))


def test_a_state_only_reward_on_outliers_pushes_down_overweighted_tokens_only():
    s, t = pair()
    loss = ForwardKL(support="teacher_top_k", top_k=K)
    outliers = ~TrustRegion("soft")
    gradient = expected_gradient(StateReward(loss), s, t, outliers)
    log_s = s.detach().log_softmax(-1)
    cost = (t.topk(K).values.exp() * (t.topk(K).values - log_s[t.topk(K).indices])).sum()
    excess = (log_s.exp() - t.exp()).clamp_min(0)
    close(gradient, cost * (excess - excess.sum() * log_s.exp()))


def test_expected_share_of_outliers_is_the_total_variation():
    for seed in range(20):
        s, t = pair(seed, sharp=3.0)
        case = one_state(s, t)
        trusted_N = TrustRegion("soft")(case.tokens, Context())
        p = case.tokens.student_logprobs_N.exp()
        close((p * (1 - trusted_N)).sum(), 0.5 * (p - t.exp()).abs().sum(), 1e-14)


def test_soft_and_sampled_trust_have_equal_expected_gradients():
    """E over the draw as well: each token is trusted with probability P and an outlier with 1 - P."""
    s, t = pair(sharp=2.0)
    reward, outlier = PolicyGradient(LogRatio()), ForwardKL(support="teacher_top_k", top_k=K)
    soft = expected_gradient(reward, s, t, TrustRegion("soft")) + expected_gradient(outlier, s, t, ~TrustRegion("soft"))
    case = one_state(s, t)
    p_N = case.tokens.log_ratio_N.clamp(max=0).exp()
    sampled = torch.zeros_like(s)
    for v in range(V):
        row = _rows_at(s, t, v)
        both = [torch.autograd.grad(x, s, retain_graph=True)[0] for x in row(reward, outlier)]
        sampled += case.tokens.student_logprobs_N[v].exp() * (p_N[v] * both[0] + (1 - p_N[v]) * both[1])
    close(soft, sampled)


def _rows_at(s, t, v):
    """The two losses of a drawn token v, each with gradient."""

    def losses(reward, outlier):
        case = one_state(s, t)
        tokens, view = case.tokens.rows(slice(v, v + 1)), case.view(slice(v, v + 1))
        return reward(tokens, view, tokens.log_ratio_N).sum(), outlier(tokens, view, None).sum()

    return losses


def test_draws_trust_a_token_with_the_probability_of_agreement():
    """Frequencies over 40,000 rollouts, within 4 standard errors."""
    positions = torch.zeros(40_000, dtype=torch.int64)
    u = uniform(torch.arange(40_000) * 977 - 5, positions)
    for p in (0.01, 0.3, 0.5, 0.97):
        error = math.sqrt(p * (1 - p) / 40_000)
        assert abs(float((u < p).double().mean()) - p) < 4 * error


def test_masked_log_ratio_is_the_gradient_of_an_f_divergence():
    """f(r) = r - 1 - log r above 1, r log^2(r) / 2 below: the push-down fades where forward KL takes over."""
    s, t = pair(sharp=2.0)

    def divergence(log_s):
        r = (t - log_s).exp()
        f = torch.where(r >= 1, r - 1 - r.log(), 0.5 * r * r.log() ** 2)
        return (log_s.exp() * f).sum()

    gradient = expected_gradient(PolicyGradient(LogRatio()), s, t, TrustRegion("soft"))
    close(gradient, gradient_of(divergence, s))


def test_a_floor_on_the_reward_bounds_what_one_token_can_weigh():
    s, t = pair(sharp=6.0)
    case = one_state(s, t)
    floored = chain(LogRatio(), Clip(low=-2.5))(torch.zeros(V, dtype=F64), case.tokens, Context())
    assert float(case.tokens.log_ratio_N.min()) < -2.5 == float(floored.min())


def test_generalised_and_stop_gradient_reverse_kl_have_the_same_gradient():
    case = make_case()
    losses = [ReverseKL(support="teacher_top_k", top_k=K, outside=o) for o in ("generalised", "stop_gradient")]
    a, b = (torch.autograd.grad(x(case.tokens, case.view(), None).sum(), case.logits)[0] for x in losses)
    close(a, b)


def test_generalised_reverse_kl_is_never_negative_and_the_raw_sum_is():
    negative = 0
    for seed in range(20):
        case = make_case(seed, sharp=3.0)
        raw = ReverseKL(support="teacher_top_k", top_k=K)(case.tokens, case.view(), None).detach()
        fixed = ReverseKL(support="teacher_top_k", top_k=K, outside="generalised")(case.tokens, case.view(), None)
        assert float(fixed.detach().min()) > -1e-12
        negative += int((raw < 0).sum())
    assert negative > 0


def test_a_bucket_never_exceeds_the_full_divergence():
    for seed in range(10):
        case = make_case(seed)
        for kind in (ForwardKL, ReverseKL):
            full = kind()(case.tokens, case.view(), None)
            bucket = kind(support="teacher_top_k", top_k=K, outside="bucket")(case.tokens, case.view(), None)
            assert bool((bucket <= full + 1e-12).all())


def test_forward_kl_outlier_gradient_is_bounded_by_two():
    for seed in range(10):
        s, t = pair(seed, sharp=20.0)
        loss = ForwardKL(support="teacher_top_k", top_k=K)
        case = one_state(s, t)
        value = loss(case.tokens.rows(slice(0, 1)), case.view(slice(0, 1)), None).sum()
        assert float(torch.autograd.grad(value, s)[0].abs().sum()) <= 2 + 1e-12


def test_the_second_moment_of_a_trusted_reward_is_bounded():
    """pi_S P log^2 r <= pi_S * 4 / e^2 for r < 1: no token that the teacher finds impossible outweighs the others."""
    s, t = pair(sharp=20.0)
    case = one_state(s, t)
    r = case.tokens.log_ratio_N
    p = r.clamp(max=0).exp()
    assert float((p * r**2)[r < 0].max()) <= 4 * math.exp(-2) + 1e-12
    assert float((r**2).max()) > 100


def test_monte_carlo_agrees_with_enumeration_for_the_policy_gradient():
    """20,000 draws, within 4 standard errors in every coordinate."""
    s, t = pair()
    log_s = s.detach().log_softmax(-1)
    g = torch.Generator().manual_seed(3)
    x = torch.multinomial(log_s.exp(), 20_000, replacement=True, generator=g)
    score = torch.nn.functional.one_hot(x, V).to(F64) - log_s.exp()
    samples = -(t - log_s)[x][:, None] * score
    error = samples.std(0) / math.sqrt(len(x))
    exact = expected_gradient(PolicyGradient(LogRatio()), s, t)
    assert bool(((samples.mean(0) - exact).abs() < 4 * error).all())


def test_scaling_a_reward_scales_its_gradient():
    s, t = pair()
    close(
        expected_gradient(PolicyGradient(chain(LogRatio(), Scale(3.0))), s, t),
        3.0 * expected_gradient(PolicyGradient(LogRatio()), s, t),
    )
