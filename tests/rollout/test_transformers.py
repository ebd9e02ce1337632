from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.models.mamba import MambaConfig, MambaForCausalLM
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.t5 import T5Config, T5ForConditionalGeneration

from tests.tiny import VOCAB, tiny_config, tiny_model
from tropd.errors import ConfigError, DataError, EngineError
from tropd.objective.draws import uniform
from tropd.rollout.sampling import draw_uniforms, invert, truncate
from tropd.rollout.transformers import PREFILL_TOKENS, TransformersEngine
from tropd.types import Completion, Finish, Request, Sampling

GREEDY = Sampling(temperature=0.0)
LENGTHS = (3, 17, 9, 9, 1, 30)
SAMPLINGS = [
    Sampling(),
    Sampling(temperature=0.6),
    Sampling(temperature=1.7),
    Sampling(top_p=0.8),
    Sampling(top_k=3),
    Sampling(min_p=0.2),
    Sampling(temperature=1.5, top_k=6, top_p=0.9, min_p=0.05),
]


def some_prompts(lengths=LENGTHS, vocab: int = 256, seed: int = 0) -> list[tuple[int, ...]]:
    numbers = random.Random(seed)
    return [tuple(numbers.randrange(vocab) for _ in range(n)) for n in lengths]


def some_requests(num: int = 24, **changes) -> list[Request]:
    """Ragged prompts, ragged lengths, and a stop about every ninth token."""
    stop_ids = tuple(range(0, VOCAB, 9))
    first = Request(token_ids=(0,), max_new_tokens=1, seed=0, stop_ids=stop_ids)
    prompts = some_prompts() * (num // len(LENGTHS))
    return [replace(first, token_ids=p, max_new_tokens=20 + i, seed=i, **changes) for i, p in enumerate(prompts)]


@torch.no_grad()
def plain_logits(model, request: Request, completion: Completion, vocab_size: int = VOCAB) -> Tensor:
    """One forward without cache or padding: the logits that each new token was drawn from."""
    text = torch.tensor([request.token_ids + completion.token_ids])
    return model(text, use_cache=False).logits[0, len(request.token_ids) - 1 : -1, :vocab_size].float()


def plain_probs(logits_TV: Tensor, sampling: Sampling) -> Tensor:
    """The distribution that is sampled from, token by token, written as plainly as possible."""
    probs_TV = torch.softmax(logits_TV.double() / sampling.temperature, -1)
    for probs in probs_TV:
        order = probs.argsort(descending=True).tolist()
        if sampling.top_k:
            probs[order[sampling.top_k :]] = 0.0
            probs /= probs.sum()
        mass = 0.0
        for token in order:
            if mass >= sampling.top_p:
                probs[token] = 0.0
            mass += float(probs[token])
        probs[probs < sampling.min_p * probs.max()] = 0.0
    return probs_TV / probs_TV.sum(-1, keepdim=True)


def count_forwards(model) -> list[torch.Size]:
    """The shape of the input of every forward pass from now on."""
    shapes: list[torch.Size] = []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    return shapes


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2", "gemma2"])
def test_greedy_tokens_are_those_of_generate(family):
    model = tiny_model(family)
    requests = [
        Request(token_ids=p, max_new_tokens=12 + i, seed=i, sampling=GREEDY) for i, p in enumerate(some_prompts())
    ]
    for request, completion in zip(requests, TransformersEngine(model, max_batch=4).generate(requests), strict=True):
        assert list(completion.token_ids) == greedy_by_transformers(model, request)
        assert set(completion.behavior_logprobs) == {0.0}


def test_greedy_tokens_are_those_of_generate_beyond_a_sliding_window():
    config = tiny_config("gemma2")
    config.sliding_window = 8
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(16.0)
    requests = [Request(token_ids=p, max_new_tokens=20, seed=0, sampling=GREEDY) for p in some_prompts()]
    for request, completion in zip(requests, TransformersEngine(model, max_batch=4).generate(requests), strict=True):
        assert list(completion.token_ids) == greedy_by_transformers(model, request)


def greedy_by_transformers(model, request: Request) -> list[int]:
    text = torch.tensor([request.token_ids])
    mask = torch.ones_like(text)  # or generate takes a token of the prompt for padding
    limits = dict(do_sample=False, max_new_tokens=request.max_new_tokens, pad_token_id=0)
    return model.generate(text, attention_mask=mask, **limits)[0, text.shape[1] :].tolist()


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_a_rollout_does_not_depend_on_max_batch_or_order_or_neighbours(family):
    model = tiny_model(family)
    requests = some_requests()
    alone = [TransformersEngine(model).generate([request])[0] for request in requests]
    assert len({c.token_ids for c in alone}) > 20
    for max_batch in (1, 2, 5, 64):
        together = TransformersEngine(model, max_batch=max_batch).generate(requests)
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        gap = max(abs(a - b) for c, d in zip(together, alone, strict=True) for a, b in zip_logprobs(c, d))
        assert gap < 1e-4
    order = random.Random(1).sample(range(len(requests)), k=10)
    shuffled = TransformersEngine(model, max_batch=7).generate([requests[i] for i in order])
    assert [c.token_ids for c in shuffled] == [alone[i].token_ids for i in order]


def zip_logprobs(a: Completion, b: Completion):
    return zip(a.behavior_logprobs + a.model_logprobs, b.behavior_logprobs + b.model_logprobs, strict=True)


def test_a_long_queue_outgrows_the_buffers_and_still_agrees():
    model = tiny_model()
    requests = [replace(r, stop_ids=(), max_new_tokens=30 + 8 * i) for i, r in enumerate(some_requests(12))]
    alone = [TransformersEngine(model).generate([request])[0] for request in requests]
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["past_key_values"].get_seq_length()), with_kwargs=True
    )
    together = TransformersEngine(model, max_batch=3).generate(requests)
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    longest = max(len(r.token_ids) + r.max_new_tokens for r in requests)
    assert 64 < max(widths) < longest < sum(r.max_new_tokens for r in requests) / 3


def test_each_request_of_a_batch_has_its_own_sampling():
    model = tiny_model(sharp=6.0)
    requests = [replace(r, sampling=s) for r, s in zip(some_requests(), [*SAMPLINGS, GREEDY] * 3, strict=True)]
    together = TransformersEngine(model).generate(requests)
    assert together == [
        replace(c, behavior_logprobs=d.behavior_logprobs, model_logprobs=d.model_logprobs)
        for c, d in zip([TransformersEngine(model).generate([r])[0] for r in requests], together, strict=True)
    ]


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
    ids=str,
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


def test_a_stop_token_is_the_last_token_and_says_so():
    model = tiny_model()
    request = Request(token_ids=(5, 6, 7), max_new_tokens=12, seed=3)
    engine = TransformersEngine(model)
    free = engine.generate([request])[0]
    assert (free.finish, len(free.token_ids)) == (Finish.LENGTH, 12)
    unused = next(i for i in range(VOCAB) if i not in free.token_ids)
    for end in (1, 5, 12):
        stop_ids = (unused, free.token_ids[end - 1])
        first = free.token_ids.index(free.token_ids[end - 1])
        stopped = engine.generate([replace(request, stop_ids=stop_ids)])[0]
        assert stopped == replace(
            free,
            token_ids=free.token_ids[: first + 1],
            behavior_logprobs=free.behavior_logprobs[: first + 1],
            model_logprobs=free.model_logprobs[: first + 1],
            finish=Finish.STOP,
        )


def test_padded_rows_of_the_vocabulary_are_never_drawn_and_do_not_count():
    model = tiny_model(sharp=6.0)
    requests = some_requests(12, stop_ids=(), sampling=Sampling(temperature=5.0))
    completions = TransformersEngine(model, vocab_size=40).generate(requests)
    assert max(max(c.token_ids) for c in completions) == 39
    for request, completion in zip(requests, completions, strict=True):
        logprobs_TV = plain_logits(model, request, completion, vocab_size=40).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), expected_T, atol=1e-5, rtol=0)


def test_a_continuation_goes_on_where_the_prefix_ends_and_restarts_the_random_stream():
    model = tiny_model(sharp=6.0)
    engine = TransformersEngine(model)
    whole = Request(token_ids=(5, 6, 7), max_new_tokens=20, seed=3, sampling=GREEDY)
    written = engine.generate([whole])[0].token_ids
    rest = replace(whole, token_ids=whole.token_ids + written[:8], max_new_tokens=12)
    assert engine.generate([rest])[0].token_ids == written[8:]

    sampled = replace(rest, sampling=Sampling())
    completion = engine.generate([sampled])[0]
    sums_V = plain_logits(model, sampled, completion)[0].double().softmax(-1).cumsum(-1)
    assert completion.token_ids[0] == int((sums_V <= draw_uniforms(sampled.seed, 0, 1)[0]).sum())


def test_finished_rows_leave_and_equal_prompts_are_read_once():
    model = tiny_model()
    shapes = count_forwards(model)
    requests = [Request(token_ids=(1, 2, 3, 4), max_new_tokens=n, seed=n) for n in (1, 2, 3, 9)]
    TransformersEngine(model).generate(requests)
    assert shapes == [(1, 4), (3, 1), (2, 1), *[(1, 1)] * 6]


def test_a_prefill_is_cut_so_that_its_activations_fit():
    model = tiny_model(width=8, layers=1)
    shapes = count_forwards(model)
    prompts = some_prompts(lengths=(250,) * 70)
    TransformersEngine(model, max_batch=80).generate([Request(token_ids=p, max_new_tokens=1, seed=0) for p in prompts])
    assert shapes == [(65, 250), (5, 250)]
    assert 65 * 250 <= PREFILL_TOKENS < 66 * 250


def test_a_checkpointing_model_in_training_keeps_its_cache_and_is_left_as_it_was():
    model = tiny_model()
    request = Request(token_ids=tuple(range(10)), max_new_tokens=6, seed=1)
    expected = TransformersEngine(model).generate([request])
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    shapes = count_forwards(model)
    checkpointing: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: checkpointing.append(module.is_gradient_checkpointing))
    assert TransformersEngine(model).generate([request]) == expected
    assert shapes == [(1, 10), *[(1, 1)] * 5]
    assert not any(checkpointing)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.is_gradient_checkpointing
    assert not model.config.use_cache


def test_a_model_is_left_as_it_was_after_an_error():
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    with pytest.raises(EngineError, match="logits after token 0 of request 0 are not finite"):
        TransformersEngine(model).generate([Request(token_ids=(1,), max_new_tokens=2, seed=0)])
    assert model.training and model.is_gradient_checkpointing and torch.is_grad_enabled()


def test_a_lora_model_writes_with_its_adapter():
    base = tiny_model(sharp=6.0)
    request = Request(token_ids=(1, 2, 3), max_new_tokens=12, seed=4, sampling=GREEDY)
    without = TransformersEngine(base).generate([request])[0]
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.train()
    engine = TransformersEngine(model)
    completion = engine.generate([request])[0]
    assert completion.token_ids != without.token_ids
    model.eval()
    assert list(completion.token_ids) == plain_logits(model, request, completion).argmax(-1).tolist()
    assert engine.generate(some_requests()) == TransformersEngine(model).generate(some_requests())


def test_bfloat16_logprobs_are_those_of_a_full_forward_up_to_its_rounding():
    model = tiny_model(sharp=4.0).to(torch.bfloat16)
    requests = some_requests(12)
    for request, completion in zip(requests, TransformersEngine(model).generate(requests), strict=True):
        logprobs_TV = plain_logits(model, request, completion).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), expected_T, atol=0.1, rtol=0)


def test_sync_notes_the_version_that_completions_carry():
    engine = TransformersEngine(tiny_model(), version=4)
    request = Request(token_ids=(1, 2), max_new_tokens=2, seed=0)
    assert engine.generate([request])[0].policy_version == (4, 4)
    engine.sync(None, 5)
    assert engine.generate([request])[0].policy_version == (5, 5)
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (dict(token_ids=()), DataError, "request 1 has no tokens"),
        (dict(max_new_tokens=0), DataError, "request 1 asks for max_new_tokens = 0"),
        (
            dict(token_ids=(1,) * 250, max_new_tokens=7),
            DataError,
            "7 new tokens after a prompt of 250, 257 together.*at most 256",
        ),
        (dict(token_ids=(1, VOCAB)), DataError, f"ids from 1 to {VOCAB}.*ids 0 to {VOCAB - 1}"),
        (dict(token_ids=(-1, 1)), DataError, "ids from -1 to 1"),
        (dict(stop_ids=(3, 259)), DataError, r"stops at token 259.*below 256.*len\(tokenizer\)"),
        (dict(seed=2**63), DataError, "signed 64-bit"),
        (dict(sampling=Sampling(temperature=-1.0)), ConfigError, "temperature is -1.0"),
        (dict(sampling=Sampling(temperature=math.nan)), ConfigError, "temperature is nan"),
        (dict(sampling=Sampling(top_p=0.0)), ConfigError, "top_p is 0.0"),
        (dict(sampling=Sampling(top_k=-1)), ConfigError, "top_k is -1"),
        (dict(sampling=Sampling(min_p=1.5)), ConfigError, "min_p is 1.5"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_before_any_is_begun(changes, error, words):
    model = tiny_model()
    shapes = count_forwards(model)
    good = Request(token_ids=(1, 2), max_new_tokens=4, seed=0)
    with pytest.raises(error, match=words):
        TransformersEngine(model, vocab_size=256).generate([good, replace(good, **changes)])
    assert shapes == []


def test_a_request_may_fill_the_context_to_the_last_token():
    request = Request(token_ids=(1,) * 250, max_new_tokens=6, seed=0)
    assert len(TransformersEngine(tiny_model("gpt2")).generate([request])[0].token_ids) == 6


def test_an_engine_that_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="max_batch is 0"):
        TransformersEngine(tiny_model(), max_batch=0)
    with pytest.raises(ConfigError, match=f"vocab_size is 300, but the model has {VOCAB}"):
        TransformersEngine(tiny_model(), vocab_size=300)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
            ),
            "T5ForConditionalGeneration, but it is an encoder-decoder model",
        ),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1)),
            "MambaForCausalLM, but its forward takes no position_ids",
        ),
        (
            lambda: Qwen3NextForCausalLM(
                Qwen3NextConfig(
                    vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=4, linear_num_key_heads=1, linear_num_value_heads=1,
                    linear_key_head_dim=4, linear_value_head_dim=4, num_experts=0,
                )
            ),
            "Qwen3NextForCausalLM, but it has linear_attention layers",
        ),
    ],
)  # fmt: skip
def test_a_model_without_plain_attention_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        TransformersEngine(make())
