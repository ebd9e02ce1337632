"""DistiLLM's skew divergences and MiniLLM's parts: gradients by enumeration, limits, and tokens of a mixture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.objective.cases import F64, Case, V, close, expected_gradient, gradient_of, make_case, one_state, pair
from tropd.errors import ConfigError
from tropd.methods import GKD, DistiLLM, MiniLLM
from tropd.methods.policies import Mixture, OnPolicy
from tropd.objective import ForwardKL, Objective, PolicyGradient, ReverseKL, Term
from tropd.objective.rewards import LogRatio
from tropd.objective.selectors import STUDENT
from tropd.types import Author


@pytest.mark.parametrize("skew", [0.0, 0.1, 0.9])
def test_skew_divergences_have_the_gradients_of_their_definitions(skew):
    logits, teacher = pair(seed=2)

    def reverse(s):
        return (s.exp() * (s - (skew * s.exp() + (1 - skew) * teacher.exp()).log())).sum()

    def forward(s):
        return (teacher.exp() * (teacher - (skew * teacher.exp() + (1 - skew) * s.exp()).log())).sum()

    for divergence, reference in (("skew_reverse", reverse), ("skew_forward", forward)):
        loss = DistiLLM(divergence=divergence, skew=skew).objective.terms[0].loss
        close(expected_gradient(loss, logits, teacher), gradient_of(reference, logits))


def test_without_a_skew_it_is_reverse_or_forward_kl():
    case = make_case()
    for divergence, beta in (("skew_reverse", 1.0), ("skew_forward", 0.0)):
        with pytest.warns(UserWarning):
            plain = GKD(beta=beta).objective
        close(case.gradient(DistiLLM(divergence=divergence, skew=0.0).objective), case.gradient(plain), 0.0)


@pytest.mark.parametrize("skew", [0.1, 0.5])
def test_a_skew_bounds_the_divergence_where_the_other_model_gives_nothing(skew):
    nothing, something = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    for loss in (ReverseKL(skew=skew), ForwardKL(skew=skew)):
        assert float(loss.between(nothing, something)) == pytest.approx(-math.log(skew))


def test_a_skew_on_a_support_is_corrected_by_generalised_and_not_by_stop_gradient():
    with pytest.raises(ConfigError, match="with a skew use 'generalised'"):
        ReverseKL(support="teacher_top_k", outside="stop_gradient", skew=0.1)
    logits, _ = pair(seed=2)
    same = logits.detach().log_softmax(-1)
    loss = ReverseKL(support="teacher_top_k", top_k=4, outside="generalised", skew=0.1)
    assert float(expected_gradient(loss, logits, same).abs().max()) < 1e-15


def drawn_from_a_mixture(share: float) -> tuple[Case, torch.Tensor]:
    """One row for each token that a mixture may draw, and with which probability."""
    logits, teacher = pair(seed=2)
    case = one_state(logits, teacher)
    mixture = (share * teacher.exp() + (1 - share) * logits.detach().softmax(-1)).log()
    return Case(case.logits, case.teacher, case.tokens.with_(behavior_logprobs_N=mixture)), mixture.exp()


@pytest.mark.parametrize("share", [0.0, 0.2, 0.9])
def test_tokens_of_a_mixture_are_weighed_to_the_students_own_expectation(share):
    """MiniLLM's importance weight: the reward's gradient is that of tokens which the student drew itself."""
    case, probability_N = drawn_from_a_mixture(share)
    objective = Objective(Term("t", STUDENT, PolicyGradient(LogRatio())))
    plan = objective.plan(case.tokens)
    plan.weights["t"] *= V * probability_N
    loss = objective(case.tokens, case.view(), plan).loss
    logits, teacher = pair(seed=2)
    found = torch.autograd.grad(loss, case.logits)[0].sum(0)
    close(found, expected_gradient(PolicyGradient(LogRatio()), logits, teacher))


def test_minillm_trains_on_texts_of_the_data_set_beside_its_own():
    case = make_case()
    method, teacher_N = MiniLLM(text_share=0.25, text_weight=0.5), case.tokens.authors_N == Author.TEACHER
    assert method.rollout == Mixture(student_share=0.75, coin="rollout") and MiniLLM().rollout == OnPolicy()
    gradient, plain = case.gradient(method.objective), case.gradient(MiniLLM().objective)
    own = torch.nn.functional.one_hot(case.tokens.token_ids_N, V).to(F64)
    expected = 0.5 * (case.logits.detach().softmax(-1) - own) / int(teacher_N.sum())
    close(gradient[teacher_N], expected[teacher_N], 1e-12)
    counts = method.objective.plan(case.tokens).counts
    close(gradient[~teacher_N] * counts.student, plain[~teacher_N] * counts.actions, 1e-12)


def test_minillms_reward_clip_bounds_each_log_ratio_before_the_sum():
    case = make_case(sharp=4.0)
    knobs: dict[str, Any] = {"length_normalised": False, "standardised": False, "single_step": False}
    free, clipped = (MiniLLM(reward_clip=c, **knobs).objective.plan(case.tokens) for c in (None, 0.5))
    ratio_N = case.tokens.log_ratio_N.clamp(-0.5, 0.5)
    for n in range(len(case.tokens)):
        if float(clipped.weights["long"][n]) == 0:
            continue
        later = [m for m in range(n, len(ratio_N)) if case.tokens.sequences_N[m] == case.tokens.sequences_N[n]]
        later = [m for m in later if int(case.tokens.authors_N[m]) in (Author.STUDENT, Author.TEACHER)]
        assert float(clipped.rewards["long"][n]) == pytest.approx(float(ratio_N[later].sum()))
    assert not torch.equal(free.rewards["long"], clipped.rewards["long"])
    never = case.tokens.with_(teacher_logprobs_N=torch.full_like(case.tokens.teacher_logprobs_N, -torch.inf))
    plan = MiniLLM(reward_clip=0.5, **knobs).objective.plan(never)
    assert bool(plan.rewards["long"].isfinite().all())
