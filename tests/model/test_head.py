"""The head keeps no logits, takes sums in float32 or better, and refuses what it would misread."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig
from transformers.models.bert import BertConfig
from transformers.models.mamba import MambaConfig

from tests.model.cases import assert_same_gradients, gradients, plain, rollouts_of, tokens_of, written
from tests.tiny import VOCAB, tiny_config, tiny_model
from tropd.errors import ConfigError
from tropd.model.forward import Forward
from tropd.model.head import Head
from tropd.model.likeliest import likeliest
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs


def test_padded_vocabulary_rows_take_no_probability() -> None:
    model = tiny_model("llama", vocab=VOCAB + 26)
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 100.0
        expected_NV = plain(model, rollouts_of(), VOCAB)
        assert (plain(model, rollouts_of()).argmax(-1) >= VOCAB).any()
    measured = Forward(model, vocab_size=VOCAB).measure(rollouts_of(), Needs.FULL, top_k=8)
    assert measured.full_logprobs_NV is not None and measured.topk_ids_NK is not None
    torch.testing.assert_close(measured.full_logprobs_NV, expected_NV, rtol=1e-5, atol=1e-5)
    assert measured.topk_ids_NK.max() < VOCAB
    whole = Forward(model, vocab_size=VOCAB).measure(rollouts_of(), Needs.SAMPLED, top_k=10 * VOCAB).topk_ids_NK
    assert whole is not None and torch.equal(whole.sort(-1).values, torch.arange(VOCAB).expand(27, -1))


def test_half_precision_weights_have_float32_statistics() -> None:
    model = tiny_model("gemma2").bfloat16()
    rollouts = rollouts_of()
    forward = Forward(model, tiling=Tiling(tile_tokens=8))
    view = forward.view(rollouts, tokens_of(rollouts), Needs.FULL)
    measured = forward.measure(rollouts, Needs.TEACHER_ENTROPY, top_k=4)
    for found in (view.logprobs_N, view.full_logprobs_NV, measured.topk_logprobs_NK, measured.entropy_N):
        assert found is not None and found.dtype == torch.float32
    # bfloat16 keeps 3 digits: sums taken in it are off by more than 1e-3
    assert (view.full_logprobs_NV.exp().sum(-1) - 1.0).abs().max() < 1e-5
    with torch.no_grad():
        hidden_NH = forward.hidden(rollouts)
        logits_NV = forward.head.logits(hidden_NH)
        exact_NV, rounded_NV = hidden_NH.double() @ model.lm_head.weight.double().t(), model.lm_head(hidden_NH)
    assert logits_NV.dtype == torch.bfloat16
    peaks_N9 = torch.cat([tokens_of(rollouts).token_ids_N[:, None], rounded_NV.topk(8).indices], 1)
    mixed_NV = rounded_NV.double().scatter(1, peaks_N9, exact_NV.gather(1, peaks_N9))
    expected_NV = forward.head.transform(mixed_NV).log_softmax(-1).float()
    torch.testing.assert_close(view.full_logprobs_NV, expected_NV, rtol=1e-5, atol=1e-5)
    view.logprobs_N.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that anything makes meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_flatten(result)[0]:
            if isinstance(leaf, Tensor):
                self.num_elements = max(self.num_elements, leaf.numel())
        return result


def test_nothing_has_tokens_times_vocabulary_elements_unless_the_full_distribution_is_asked_for() -> None:
    rollouts = rollouts_of([(2, 20)] * 4)
    model = tiny_model("qwen3", tied=True)
    forward = Forward(model, tiling=Tiling(tile_tokens=8))
    ids_NK = torch.zeros(80, 5, dtype=torch.long)
    tokens = tokens_of(rollouts, teacher_topk_ids_NK=ids_NK, student_topk_ids_NJ=ids_NK)
    weight = model.lm_head.weight.numel()
    limit = max(8 * VOCAB, weight)
    assert limit < 80 * VOCAB
    with Largest() as largest:
        view = forward.view(rollouts, tokens, Needs.SAMPLED | Needs.TOPK | Needs.STUDENT_TOPK)
        (view.logprobs_N.sum() + view.topk_logprobs_NK.sum() + view.student_topk_logprobs_NJ.sum()).backward()
        forward.measure(rollouts, Needs.STUDENT_ENTROPY, top_k=5, at_ids_NJ=ids_NK)
        forward.reverse_kl(rollouts, forward)
    assert largest.num_elements == limit
    with Largest() as largest:
        forward.view(rollouts, tokens, Needs.FULL)
    assert largest.num_elements == 80 * VOCAB


def test_no_tile_of_logits_is_kept_for_backward() -> None:
    rollouts = rollouts_of([(2, 20)] * 4)
    forward = Forward(tiny_model("qwen3", tied=True), tiling=Tiling(tile_tokens=80))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
    assert kept and max(kept) < 80 * VOCAB


def test_likeliest_tokens_are_sorted_and_equal_ones_are_taken_by_id() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV = torch.randint(-3, 3, (40, 50), generator=generator).float()
    logits_NV[0] = 0.0
    logits_NV[1, 7] = float("-inf")
    logits_NV[2] = torch.randn(50, generator=generator)
    for top_k in (1, 2, 7, 49, 50):
        ids_NK, values_NK = likeliest(logits_NV, top_k)
        expected = logits_NV.sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids_NK, expected.indices[:, :top_k])
        assert torch.equal(values_NK, expected.values[:, :top_k])


def test_building_a_forward_draws_no_random_number_and_leaves_no_hook() -> None:
    model = tiny_model("gpt2").train()
    state = torch.get_rng_state()
    Forward(model, layout="packed")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_an_adapter_on_the_head_is_read_and_trained() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama").double(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ).double()
    rollouts = rollouts_of()
    view = Forward(model, tiling=Tiling(tile_tokens=8)).view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
    expected_N = written(rollouts, plain(model, rollouts))
    torch.testing.assert_close(view.logprobs_N, expected_N, rtol=1e-10, atol=1e-10)
    wanted = gradients(model, expected_N.sum())
    assert any("lm_head" in name for name in wanted)
    assert_same_gradients(gradients(model, view.logprobs_N.sum()), wanted, 1e-9)


class Doubled(LlamaForCausalLM):
    """A head that no configuration tells of."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 2.0
        return output


def test_a_head_that_would_be_misread_is_refused() -> None:
    with pytest.raises(ConfigError, match="head of Doubled"):
        Head.of(Doubled(tiny_config("llama")))
    for family, field in (("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale")):
        model = tiny_model(family, sharp=0.1)  # logits so small that a soft cap hardly shows
        head = Head.of(model)
        misread = Head(module=head.module, vocab_size=head.vocab_size)
        hidden_NH = 50.0 * torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        assert not torch.allclose(head.logits(hidden_NH), misread.logits(hidden_NH), rtol=1e-3), field


def refused(model: nn.Module, text: str, **options: Any) -> None:
    with pytest.raises(ConfigError, match=text):
        Forward(model, **options)


def test_what_is_no_causal_language_model_is_refused_in_words() -> None:
    bert = BertConfig(vocab_size=60, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    refused(nn.Linear(2, 2), "no transformers model")
    refused(AutoModel.from_config(tiny_config("llama")), "no language-model head")
    refused(AutoModelForCausalLM.from_config(bert), "looks ahead")
    encoder_decoder = tiny_model("llama")
    encoder_decoder.config.is_encoder_decoder = True
    refused(encoder_decoder, "encoder-decoder")
    refused(tiny_model("llama"), "vocab_size = 263", vocab_size=VOCAB + 1)
    with pytest.raises(ConfigError, match="tile_tokens = 0"):
        Tiling(tile_tokens=0)


def test_prompt_tuning_is_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    refused(get_peft_model(tiny_model("llama"), config), "prompt")


def test_packing_is_refused_where_sequences_would_see_each_other() -> None:
    config: PretrainedConfig = MambaConfig(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=4)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    refused(model, "packed", layout="packed")
    rollouts = rollouts_of(vocab=60)
    with torch.no_grad():
        expected_N = written(rollouts, plain(model.eval(), rollouts))
    torch.testing.assert_close(Forward(model).measure(rollouts, Needs.SAMPLED).logprobs_N, expected_N)
