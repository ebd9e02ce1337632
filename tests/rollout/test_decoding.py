"""The decoder writes what the model's own forward writes, or leaves the model to itself and says why."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.rollout.plain import plain_logits, some_requests
from tests.tiny import random_model, tiny_config, tiny_model
from tropd.rollout.decoding import obstacle
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Request

REQUESTS = [replace(r, stop_ids=(0, 60)) for r in some_requests(12)]
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=1e4,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
CONFIGS = {
    "llama": tiny_config("llama"),
    "llama, tied": tiny_config("llama", tied=True),
    "llama with biases and scaled positions": tiny_config(
        "llama", attention_bias=True, mlp_bias=True, rope_parameters=LLAMA3
    ),
    "qwen2": tiny_config("qwen2"),
    "qwen3": tiny_config("qwen3"),
    "qwen3, wide": tiny_config("qwen3", width=320),
}


def make(config, dtype: torch.dtype = torch.float32):
    model = random_model(config, seed=1, sharp=8.0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)  # weights of norms start at one, biases at zero
    return model.to(dtype)


def write(model, requests=REQUESTS, *, own: bool = False, max_batch: int = 5):
    engine = TransformersEngine(model, vocab_size=256, max_batch=max_batch)
    engine.stepper.misread = own
    return engine, engine.generate(requests)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_its_tokens_and_logprobs_are_those_of_the_models_own_forward(config):
    model = make(config)
    assert not obstacle(model, model)
    engine, completions = write(model)
    assert engine.stepper.compared and not engine.stepper.misread
    _, own = write(model, own=True)
    assert [c.token_ids for c in completions] == [c.token_ids for c in own]
    for request, completion in zip(REQUESTS, completions, strict=True):
        logprobs_TV = plain_logits(model, request, completion, 256).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), expected_T, atol=1e-4, rtol=0)


def test_bfloat16_is_as_near_as_its_rounding():
    model = make(CONFIGS["qwen3, wide"], torch.bfloat16)
    engine, completions = write(model)
    assert engine.stepper.compared and not engine.stepper.misread
    for request, completion in zip(REQUESTS, completions, strict=True):
        logprobs_TV = plain_logits(model, request, completion, 256).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        error_T = (torch.tensor(completion.model_logprobs) - expected_T).abs()
        assert error_T.mean() < 0.1


def test_a_lora_model_is_stepped_with_its_adapter_and_without_it_where_that_is_off():
    base = make(CONFIGS["qwen3"])
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    engine, adapted = write(model)
    assert engine.stepper.compared and not engine.stepper.misread
    assert [c.token_ids for c in adapted] == [c.token_ids for c in write(model, own=True)[1]]
    with model.disable_adapter():
        bare = write(model)[1]
    assert [c.token_ids for c in bare] != [c.token_ids for c in adapted]


def test_new_weights_are_used_by_the_next_call():
    model = make(CONFIGS["qwen3"])
    engine, before = write(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
    after = engine.generate(REQUESTS)
    assert [c.token_ids for c in after] != [c.token_ids for c in before]
    assert [c.token_ids for c in after] == [c.token_ids for c in write(model, own=True)[1]]


@pytest.mark.parametrize("width", [32, 320])
def test_a_layer_that_computes_something_else_is_noticed_and_left_to_itself(width):
    model = make(tiny_config("llama", width=width))
    mlp = model.model.layers[1].mlp
    plain = type(mlp).forward
    mlp.forward = lambda x: 2.0 * plain(mlp, x)
    with pytest.warns(UserWarning, match="LlamaForCausalLM gives other logits .* its own forward writes"):
        engine, completions = write(model)
    assert engine.stepper.misread
    for request, completion in zip(REQUESTS, completions, strict=True):
        logprobs_TV = plain_logits(model, request, completion, 256).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), expected_T, atol=1e-4, rtol=0)
    assert engine.generate(REQUESTS) == completions


def test_hooks_are_called_at_every_step():
    model = make(CONFIGS["llama"])
    shapes = []
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:2]))
    TransformersEngine(model).generate([Request(token_ids=(1, 2, 3), max_new_tokens=20, seed=0)])
    assert shapes == [(1, 3), *[(1, 1)] * 19]


@pytest.mark.parametrize(
    ("family", "words"), [("gpt2", "GPT2LMHeadModel is none of"), ("gemma2", "none of"), ("granite", "none of")]
)
def test_other_families_run_their_own_forward_and_say_so(family, words):
    model = tiny_model(family)
    assert words in obstacle(model, model)
    assert words in TransformersEngine(model).notes[0]
    assert TransformersEngine(tiny_model()).notes == []


def test_a_process_that_compares_the_decoder_with_the_model_writes_what_one_that_does_not_writes():
    model = tiny_model("qwen3")
    requests = [replace(r, stop_ids=(), max_new_tokens=28) for r in some_requests(6)]
    engine = TransformersEngine(model, max_batch=3)
    first = engine.generate(requests)
    assert engine.stepper.compared
    assert engine.generate(requests) == first
