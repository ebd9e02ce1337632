from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.rollout.plain import (
    GREEDY,
    SAMPLINGS,
    count_forwards,
    plain_logits,
    some_prompts,
    some_requests,
)
from tests.tiny import VOCAB, tiny_model
from tropd.errors import EngineError
from tropd.model.hf import cache_argument
from tropd.rollout.rows import PREFILL_TOKENS
from tropd.rollout.sampling import draw_uniforms
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Completion, Finish, Request, Sampling


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
    model = tiny_model("gemma2", sliding_window=8)
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
        lambda module, args, kwargs: widths.append(kwargs[cache_argument(model)].get_seq_length()), with_kwargs=True
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


def test_a_model_in_training_writes_without_dropout_and_without_a_graph():
    model = tiny_model("gpt2", sharp=6.0)
    assert model.config.resid_pdrop > 0
    request = Request(token_ids=(1, 2, 3), max_new_tokens=12, seed=4)
    expected = TransformersEngine(model).generate([request])
    graphs: list[bool] = []
    model.lm_head.register_forward_hook(lambda module, args, output: graphs.append(output.requires_grad))
    assert TransformersEngine(model.train()).generate([request]) == expected
    assert not any(graphs)


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
    engine.sync(5)
    assert engine.generate([request])[0].policy_version == (5, 5)
    assert engine.generate([]) == []
