"""A large head is packed once per call of generate, gives the same numbers, and is plain again afterwards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import tropd.rollout.packing as packing
from tests.rollout.plain import plain_logits, some_requests
from tests.tiny import tiny_model
from tropd.rollout.transformers import TransformersEngine


@pytest.mark.parametrize("tied", [False, True])
def test_a_large_head_is_packed_while_it_writes_and_plain_afterwards(tied):
    model = tiny_model(vocab=2**17, sharp=4.0, tied=tied)
    seen: list[bool] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append("forward" in vars(module)))
    requests = [replace(r, stop_ids=()) for r in some_requests(6)]
    assert model.lm_head.weight.numel() >= packing._MIN_WEIGHTS
    completions = TransformersEngine(model).generate(requests)
    assert seen and all(seen)
    assert "forward" not in vars(model.lm_head)
    for request, completion in zip(requests, completions, strict=True):
        logprobs_TV = plain_logits(model, request, completion, 2**17).log_softmax(-1)
        expected_T = logprobs_TV.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), expected_T, atol=1e-4, rtol=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    assert TransformersEngine(model).generate(requests) != completions


def test_a_packed_head_is_plain_again_after_an_error():
    model = tiny_model(vocab=2**17)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan
    with pytest.raises(Exception, match="not finite"):
        TransformersEngine(model).generate([replace(some_requests(6)[0], max_new_tokens=20)])
    assert "forward" not in vars(model.lm_head)
