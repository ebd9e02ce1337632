from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from tests.rollout.plain import SAMPLINGS, plain_logits, plain_probs, some_requests
from tests.tiny import tiny_model
from tropd.objective.draws import uniform
from tropd.rollout.sampling import draw_uniforms, invert, truncate
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Request, Sampling


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_every_token_is_the_inverse_cdf_of_its_uniform_and_its_logprobs_are_right(sampling):
    model = tiny_model(sharp=6.0)
    requests = some_requests(12, sampling=sampling)
    for request, completion in zip(requests, TransformersEngine(model).generate(requests), strict=True):
        logits_TV = plain_logits(model, request, completion)
        probs_TV = plain_probs(logits_TV, sampling)
        uniforms_T = torch.tensor(draw_uniforms(request.seed, 0, len(completion.token_ids)), dtype=torch.float64)
        assert list(completion.token_ids) == (probs_TV.cumsum(-1) <= uniforms_T[:, None]).sum(-1).tolist()
        ids_T1 = torch.tensor(completion.token_ids)[:, None]
        behavior_T = probs_TV.gather(1, ids_T1)[:, 0].log().float()
        model_T = logits_TV.log_softmax(-1).gather(1, ids_T1)[:, 0]
        torch.testing.assert_close(torch.tensor(completion.behavior_logprobs), behavior_T, atol=2e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), model_T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
def test_frequencies_over_many_seeds_match_the_distribution(sampling):
    vocab, num = 12, 2000
    model = tiny_model(vocab=vocab, sharp=8.0)
    requests = [Request(token_ids=(1, 2, 3), max_new_tokens=1, seed=s, sampling=sampling) for s in range(num)]
    completions = TransformersEngine(model, max_batch=num).generate(requests)
    counts = Counter(c.token_ids[0] for c in completions)
    for token, p in enumerate(
        plain_probs(plain_logits(model, requests[0], completions[0], vocab), sampling)[0].tolist()
    ):
        assert abs(counts[token] - num * p) <= 4 * math.sqrt(num * p * (1 - p))


@pytest.mark.parametrize(
    ("sampling", "warper"),
    [
        (Sampling(top_k=40), TopKLogitsWarper(top_k=40)),
        (Sampling(top_p=0.05), TopPLogitsWarper(top_p=0.05)),
        (Sampling(top_p=0.9), TopPLogitsWarper(top_p=0.9)),
        (Sampling(top_p=0.9999), TopPLogitsWarper(top_p=0.9999)),
        (Sampling(min_p=0.01), MinPLogitsWarper(min_p=0.01)),
    ],
    ids=["top_k", "small top_p", "top_p", "large top_p", "min_p"],
)
def test_truncation_keeps_the_tokens_that_transformers_keeps(sampling, warper):
    scores_BV = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [3], [9]])
    kept_BV = truncate(scores_BV, sampling).isfinite()
    assert torch.equal(kept_BV, warper(torch.zeros(4, 1), scores_BV.clone()).isfinite())
    assert not kept_BV.all()


def test_equally_likely_tokens_at_the_edge_stay_together():
    scores_BV = torch.tensor([[1.0, 3.0, 1.0, 1.0, 0.0]])
    for sampling in (Sampling(top_k=2), Sampling(top_p=0.8)):
        assert truncate(scores_BV, sampling).isfinite().tolist() == [[True, True, True, True, False]]


def test_each_token_owns_as_much_of_the_unit_interval_as_it_weighs_however_rare_it_is():
    vocab = 1300
    weights_V = torch.rand(vocab, generator=torch.Generator().manual_seed(0)) + 0.1
    weights_V[3::7] = 0.0
    weights_V[700] = 1e9  # a float32 running sum would lose every token after it
    low_V, high_V = torch.zeros(vocab, dtype=torch.float64), torch.ones(vocab, dtype=torch.float64)
    for _ in range(60):  # bisect the end of each token's interval
        middle_V = (low_V + high_V) / 2
        beyond_V = invert(weights_V.expand(vocab, -1), middle_V.tolist()) > torch.arange(vocab)
        low_V, high_V = torch.where(beyond_V, low_V, middle_V), torch.where(beyond_V, middle_V, high_V)
    widths_V = high_V.diff(prepend=torch.zeros(1, dtype=torch.float64))
    torch.testing.assert_close(widths_V, (weights_V / weights_V.sum()).double(), rtol=1e-5, atol=1e-14)


def test_a_token_of_weight_zero_is_never_drawn():
    weights_V = torch.ones(1300)
    weights_V[0] = weights_V[600:640] = weights_V[1299] = 0.0
    ends = [0.0, 599 / 1258, 1 - 2.0**-48]
    assert invert(weights_V.expand(3, -1), ends).tolist() == [1, 640, 1298]


def test_a_token_has_48_random_bits_and_the_first_24_are_those_of_the_counter():
    draws = torch.tensor(draw_uniforms(-5, 7, 2000), dtype=torch.float64)
    high = uniform(torch.tensor([-5]), torch.arange(7, 2007), stream=1).double()
    assert torch.equal((draws * 2**24).floor() * 2.0**-24, high)
    low = draws * 2**24 % 1
    assert len(set(low.tolist())) == 2000
    assert abs(low.mean() - 0.5) < 4 / math.sqrt(12 * 2000)
    assert abs(torch.corrcoef(torch.stack([high, low]))[0, 1]) < 4 / math.sqrt(2000)
    assert draws.tolist() == draw_uniforms(-5, 7, 1) + draw_uniforms(-5, 8, 1999)
