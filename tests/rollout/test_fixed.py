"""Steps of fixed shape write what steps that follow the rows write, and so does a recording of them.

A CUDA graph does again the operations that were recorded, on the same addresses and with the same numbers from Python.
`tests.rollout.recorded` does so on a CPU, so that all but CUDA's own part is tested here; `tests/gpu` runs that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import DynamicCache
from transformers.models.gpt_neo import GPTNeoConfig

from tests.rollout.families import FAMILIES
from tests.rollout.plain import SAMPLINGS, some_requests
from tests.rollout.recorded import record
from tests.tiny import VOCAB, random_model, tiny_model
from tropd.errors import EngineError
from tropd.model.hf import FAMILIES as DECODED
from tropd.model.hf import cache_argument, windows_of
from tropd.rollout.decoding import Decoder
from tropd.rollout.graphs import Recording
from tropd.rollout.slots import SlotCache, rounded_up
from tropd.rollout.transformers import TransformersEngine

REQUESTS = [replace(r, stop_ids=(0, 60)) for r in some_requests(12)]


def engines(model: Any, max_batch: int = 5) -> tuple[TransformersEngine, TransformersEngine]:
    """One whose steps are recorded and replayed, and one whose steps follow the rows."""
    fixed = TransformersEngine(model, vocab_size=256, max_batch=max_batch, fixed=True)
    fixed.stepper.graphs.recorder = record
    return fixed, TransformersEngine(model, vocab_size=256, max_batch=max_batch, fixed=False)


def tokens(engine: TransformersEngine, requests=REQUESTS) -> list[tuple[int, ...]]:
    return [completion.token_ids for completion in engine.generate(requests)]


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("own", [False, True], ids=["decoder", "own forward"])
def test_recorded_steps_write_the_tokens_of_plain_steps(config, own):
    fixed, plain = engines(random_model(config))
    fixed.stepper.misread = plain.stepper.misread = own
    written = fixed.generate(REQUESTS)
    expected = plain.generate(REQUESTS)
    assert fixed.stepper.graphs.recorded and not fixed.stepper.graphs.refused
    assert [c.token_ids for c in written] == [c.token_ids for c in expected]
    for a, b in zip(written, expected, strict=True):
        torch.testing.assert_close(torch.tensor(a.model_logprobs), torch.tensor(b.model_logprobs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_batch", [1, 7, 64])
def test_rows_come_and_go_and_buffers_grow_without_changing_a_token(max_batch):
    fixed, plain = engines(tiny_model(), max_batch)
    requests = [replace(r, stop_ids=(), max_new_tokens=30 + 8 * i) for i, r in enumerate(some_requests(18))]
    requests = [replace(r, sampling=SAMPLINGS[i % len(SAMPLINGS)]) for i, r in enumerate(requests)]
    assert tokens(fixed, requests) == tokens(plain, requests)
    slots = fixed.stepper.slots
    assert slots is not None and slots.capacity > 128 and slots.num_slots == rounded_up(min(max_batch, 18))


def test_weights_that_are_trained_in_place_need_no_new_recording():
    model = tiny_model("qwen3")
    fixed, plain = engines(model)
    before = tokens(fixed)
    recorded = dict(fixed.stepper.graphs.recorded)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-1.0)
        model.model.layers[0].self_attn.q_norm.weight.mul_(1.5)
    assert tokens(fixed) == tokens(plain) != before
    assert recorded.items() <= fixed.stepper.graphs.recorded.items()


def test_replaced_weights_and_another_adapter_are_recorded_anew():
    model = tiny_model("qwen3", sharp=6.0)
    fixed, plain = engines(model)
    tokens(fixed)
    first = set(fixed.stepper.graphs.recorded.values())
    model.lm_head.weight.data = -model.lm_head.weight.data
    assert tokens(fixed) == tokens(plain)
    assert not first & set(fixed.stepper.graphs.recorded.values())

    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)).eval()
    fixed, plain = engines(adapted)
    with_adapter = tokens(fixed)
    assert with_adapter == tokens(plain)
    with adapted.disable_adapter():
        assert tokens(fixed) == tokens(plain) != with_adapter


def test_a_family_with_masks_of_its_own_is_stepped_plainly_and_says_so():
    config = GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        max_position_embeddings=256,
    )
    fixed, plain = engines(random_model(config))
    with pytest.warns(UserWarning, match="GPTNeoForCausalLM is not stepped in fixed shapes.*its masks are its own"):
        written = tokens(fixed)
    assert fixed.stepper.slots is None
    assert written == tokens(plain) == tokens(fixed)


def test_a_step_that_cannot_be_recorded_is_run_plainly_and_said_once():
    def refuse(run: Callable[[], Tensor]) -> Recording:
        run()
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    fixed, plain = engines(tiny_model())
    fixed.stepper.graphs.recorder = refuse
    with pytest.warns(UserWarning, match="not recorded as a CUDA graph .*RuntimeError: CUDA error") as caught:
        written = tokens(fixed)
    assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 1
    assert written == tokens(plain) == tokens(fixed)
    assert fixed.stepper.graphs.refused and not fixed.stepper.graphs.recorded


def test_a_recording_that_forgets_a_number_is_noticed():
    def stale(run: Callable[[], Tensor]) -> Recording:
        return Recording(lambda: None, torch.zeros_like(run()))

    fixed, plain = engines(tiny_model())
    fixed.stepper.graphs.recorder = stale
    with pytest.warns(UserWarning, match="a replay gives other logits"):
        assert tokens(fixed) == tokens(plain)


def test_a_model_that_gave_nan_leaves_none_behind():
    fixed, plain = engines(tiny_model())
    before = tokens(fixed)
    slots = fixed.stepper.slots
    assert slots is not None
    for layer in slots.layers:
        for buffer in layer.buffers:
            buffer.fill_(math.nan)
    assert tokens(fixed) == before == tokens(plain)


def test_a_model_that_gives_nan_is_refused_and_asked_again_once_it_is_sound():
    model = tiny_model()
    fixed, plain = engines(model)
    weight = model.model.layers[1].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(math.nan)
    with pytest.raises(EngineError, match="not finite"):
        tokens(fixed)
    with torch.no_grad():
        weight.copy_(kept)
    assert tokens(fixed) == tokens(plain) and fixed.stepper.slots is not None


def test_sizes_are_few_and_never_far_above_what_is_needed():
    sizes = sorted({rounded_up(n) for n in range(1, 5000)})
    assert sizes[:10] == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32] and len(sizes) < 26
    assert all(n <= rounded_up(n) <= 1.5 * n for n in range(2, 5000))
    assert rounded_up(3, 128) == 128 and rounded_up(129, 128) == 192


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("own", [False, True], ids=["decoder", "own forward"])
def test_a_step_stays_on_its_device_and_never_waits_for_it(config, own):
    """Told without a GPU by a device whose tensors have no values: whoever asks for one, or mixes devices, fails."""
    model, prefilled = random_model(config), DynamicCache()
    arguments = {str(cache_argument(model)): prefilled, "use_cache": True}
    with torch.no_grad():
        model(torch.zeros(3, 8, dtype=torch.long), **arguments)
        engine, there = TransformersEngine(model.to("meta")), DynamicCache()
        for index, layer in enumerate(prefilled.layers):
            there.update(layer.keys.to("meta"), layer.values.to("meta"), index)
        slots = SlotCache(torch.device("meta"), torch.float32, windows_of(model))
        slots.admit(there, [0, 1, 2], [8, 5, 5], 3)
        step = engine._own_step if own or type(model).__name__ not in DECODED else Decoder(model, pack=False)
        logits_BV = step(slots.load(torch.zeros(3, 1, dtype=torch.long, device="meta")), slots)
    assert logits_BV.is_meta and logits_BV.shape == (3, VOCAB)
