from __future__ import annotations

from dataclasses import replace

import pytest
from transformers.models.mamba import MambaConfig, MambaForCausalLM
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.t5 import T5Config, T5ForConditionalGeneration

from tests.rollout.plain import count_forwards
from tests.tiny import VOCAB, tiny_model
from tropd.errors import ConfigError, DataError
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Request


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
