"""The student's forward pass says what the model's own logits say, in any layout, batch, precision or tile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, PretrainedConfig
from transformers.models.bert import BertConfig
from transformers.models.mamba import MambaConfig

from tests.tiny import VOCAB, tiny_config, tiny_model
from tropd.errors import ConfigError, DataError, EvidenceError, TrainingDiverged, VocabularyError
from tropd.objective.evidence import Needs, Tokens
from tropd.student.forward import Forward, lay_out
from tropd.student.head import Head, likeliest
from tropd.types import Author, Prompt, Rollout

FAMILIES = ["qwen3", "llama", "gpt2", "gemma2", "cohere", "granite"]
IN_FLOAT32 = {"gemma2": 1e-6, "cohere": 1e-6}
"""Families whose own norms or attention are taken in float32 in a float64 model: all that can be asked of them."""
LENGTHS = [(3, 5), (1, 9), (6, 0), (4, 1), (2, 12)]


def rollouts_of(lengths: list[tuple[int, int]] = LENGTHS, seed: int = 0, vocab: int = VOCAB) -> list[Rollout]:
    """Random rollouts with these (prompt, response) lengths."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (num_prompt, num_response) in enumerate(lengths):
        ids = tuple(torch.randint(vocab, (num_prompt + num_response,), generator=generator).tolist())
        found.append(
            Rollout(
                id=f"r{index}",
                prompt=Prompt(id=f"p{index}", token_ids=ids[:num_prompt]),
                token_ids=ids,
                authors=(Author.CONTEXT,) * num_prompt + (Author.STUDENT,) * num_response,
                behavior_logprobs=(0.0,) * len(ids),
            )
        )
    return found


def tokens_of(rollouts: list[Rollout], **evidence: Any) -> Tokens:
    ids_N = torch.tensor([token for rollout in rollouts for token in rollout.response_ids])
    zeros_S = torch.zeros(len(rollouts), dtype=torch.long)
    zeros_N = torch.zeros_like(ids_N)
    return Tokens(
        token_ids_N=ids_N,
        authors_N=zeros_N,
        sequences_N=zeros_N,
        positions_N=zeros_N,
        keys_S=zeros_S,
        num_actions_S=zeros_S,
        **evidence,
    )


def plain(model: nn.Module, rollouts: list[Rollout], vocab: int | None = None) -> Tensor:
    """[N, V] from one call of the whole model per rollout: the definition that everything is compared with."""
    rows = []
    for rollout in rollouts:
        logits_TV = model(input_ids=torch.tensor([rollout.token_ids])).logits[0, :, :vocab]
        num_prompt = len(rollout.prompt.token_ids)
        rows.append(logits_TV.log_softmax(-1)[num_prompt - 1 : -1])
    return torch.cat(rows)


def written(rollouts: list[Rollout], full_NV: Tensor) -> Tensor:
    return full_NV.gather(1, tokens_of(rollouts).token_ids_N[:, None])[:, 0]


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    assert left.keys() == right.keys() and left
    for name, gradient in left.items():
        torch.testing.assert_close(gradient, right[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_own(family: str, tied: bool, layout: Any) -> None:
    rollouts = rollouts_of()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, IN_FLOAT32.get(family, 1e-10))):
        model = tiny_model(family, tied=tied, sharp=8.0).to(dtype)
        forward = Forward(model, layout=layout, tile_tokens=4)
        with torch.no_grad():
            expected_N = written(rollouts, plain(model, rollouts))
        assert expected_N.std() > 0.01
        viewed_N = forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N
        measured_N = forward.measure(rollouts, Needs.SAMPLED).logprobs_N
        assert viewed_N.dtype == measured_N.dtype == dtype
        torch.testing.assert_close(viewed_N, expected_N, rtol=tolerance, atol=tolerance)
        assert torch.equal(viewed_N, measured_N)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sequences_do_not_see_each_other_in_sliding_windows(layout: Any) -> None:
    config = tiny_config("gemma2")
    config.sliding_window = 4
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().double()
    rollouts = rollouts_of()
    measured_N = Forward(model, layout=layout).measure(rollouts, Needs.SAMPLED).logprobs_N
    with torch.no_grad():
        expected_N = written(rollouts, plain(model, rollouts))
        model.config.sliding_window = 4096
        blind_N = written(rollouts, plain(model, rollouts))
    torch.testing.assert_close(measured_N, expected_N, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(measured_N, blind_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_everything_measured_is_the_same_in_any_batch_and_tile(layout: Any) -> None:
    model = tiny_model("llama").double()
    rollouts = rollouts_of()
    with torch.no_grad():
        full_NV = plain(model, rollouts)
    at_ids_NJ = torch.randint(VOCAB, (len(full_NV), 3), generator=torch.Generator().manual_seed(1))
    needs = Needs.FULL | Needs.STUDENT_ENTROPY
    for tile_tokens, batch in ((1, [0, 1, 2, 3, 4]), (3, [4, 2, 0]), (512, [3]), (7, [1, 3])):
        starts = [sum(length for _, length in LENGTHS[:index]) for index in batch]
        rows = [
            row for start, index in zip(starts, batch, strict=True) for row in range(start, start + LENGTHS[index][1])
        ]
        forward = Forward(model, layout=layout, tile_tokens=tile_tokens)
        some = forward.measure([rollouts[i] for i in batch], needs, top_k=5, at_ids_NJ=at_ids_NJ[rows])
        expected_NV = full_NV[rows]
        assert some.full_logprobs_NV is not None and some.entropy_N is not None and some.topk_ids_NK is not None
        torch.testing.assert_close(some.full_logprobs_NV, expected_NV, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(some.entropy_N, -(expected_NV.exp() * expected_NV).sum(-1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(some.at_logprobs_NJ, expected_NV.gather(1, at_ids_NJ[rows]), rtol=1e-10, atol=1e-10)
        assert torch.equal(some.topk_ids_NK, expected_NV.topk(5).indices)
        torch.testing.assert_close(some.topk_logprobs_NK, expected_NV.topk(5).values, rtol=1e-10, atol=1e-10)


def weighted_sum(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    return torch.stack([(weight * value).sum() for weight, value in zip(weights, values, strict=True)]).sum()


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("family", "tied"), [("qwen3", True), ("gpt2", False), ("gemma2", True), ("cohere", False), ("granite", False)]
)
def test_gradient_of_the_view_is_plain_autograds(family: str, tied: bool, layout: Any) -> None:
    tolerance = IN_FLOAT32.get(family, 1e-10)
    model = tiny_model(family, tied=tied, sharp=8.0).double()
    rollouts = rollouts_of()
    full_NV = plain(model, rollouts)
    generator = torch.Generator().manual_seed(2)
    topk_ids_NK = torch.randint(VOCAB, (len(full_NV), 4), generator=generator)
    student_ids_NJ = torch.randint(VOCAB, (len(full_NV), 2), generator=generator)
    weights = [
        torch.rand(shape, dtype=torch.float64, generator=generator) for shape in ((27,), (27, 4), (27, 2), (27, VOCAB))
    ]
    tokens = tokens_of(rollouts, teacher_topk_ids_NK=topk_ids_NK, student_topk_ids_NJ=student_ids_NJ)

    expected = [written(rollouts, full_NV), full_NV.gather(1, topk_ids_NK), full_NV.gather(1, student_ids_NJ), full_NV]
    wanted = gradients(model, weighted_sum(weights, expected))
    needs = Needs.SAMPLED | Needs.TOPK | Needs.STUDENT_TOPK | Needs.FULL
    view = Forward(model, layout=layout, tile_tokens=8).view(rollouts, tokens, needs)
    found = [view.logprobs_N, view.topk_logprobs_NK, view.student_topk_logprobs_NJ, view.full_logprobs_NV]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert_same_gradients(gradients(model, weighted_sum(weights, found)), wanted, 100 * tolerance)


def test_a_view_holds_only_what_was_asked_for() -> None:
    rollouts = rollouts_of()
    view = Forward(tiny_model()).view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
    for name in ("topk_logprobs_NK", "student_topk_logprobs_NJ", "full_logprobs_NV"):
        with pytest.raises(EvidenceError, match=name):
            getattr(view, name)


@pytest.mark.parametrize("train", [False, True])
def test_gradient_checkpointing_of_the_backbone_changes_no_gradient(train: bool) -> None:
    model = tiny_model("llama").double().train(train)
    rollouts = rollouts_of()
    forward = Forward(model, tile_tokens=8)
    wanted = gradients(model, forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N.sum())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N.sum())
    assert len(calls) == (2 if train else 1)
    assert_same_gradients(found, wanted, 1e-12)


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
    forward = Forward(model, tile_tokens=8)
    view = forward.view(rollouts, tokens_of(rollouts), Needs.FULL)
    measured = forward.measure(rollouts, Needs.TEACHER_ENTROPY, top_k=4)
    for found in (view.logprobs_N, view.full_logprobs_NV, measured.topk_logprobs_NK, measured.entropy_N):
        assert found is not None and found.dtype == torch.float32
    # bfloat16 keeps 3 digits: sums taken in it are off by more than 1e-3
    assert (view.full_logprobs_NV.exp().sum(-1) - 1.0).abs().max() < 1e-5
    with torch.no_grad():
        logits_NV = forward.head.logits(forward.hidden(rollouts))
    assert logits_NV.dtype == torch.bfloat16
    torch.testing.assert_close(view.full_logprobs_NV, logits_NV.float().log_softmax(-1), rtol=1e-5, atol=1e-5)
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
    forward = Forward(model, tile_tokens=8)
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
    forward = Forward(tiny_model("qwen3", tied=True), tile_tokens=80)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
    assert kept and max(kept) < 80 * VOCAB


def test_reverse_kl_is_the_sum_over_the_whole_vocabulary() -> None:
    student, teacher = tiny_model("qwen3").double(), tiny_model("gpt2", seed=1).double()
    rollouts = rollouts_of()
    with torch.no_grad():
        student_NV, teacher_NV = plain(student, rollouts), plain(teacher, rollouts)
    expected_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    found_N = Forward(student, tile_tokens=4).reverse_kl(rollouts, Forward(teacher))
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-10)
    assert torch.equal(Forward(student).reverse_kl(rollouts, Forward(student)), torch.zeros_like(found_N))
    with pytest.raises(VocabularyError, match=f"{VOCAB} and 100"):
        Forward(student).reverse_kl(rollouts, Forward(teacher, vocab_size=100))


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


def test_measuring_ignores_dropout_and_leaves_modes_alone() -> None:
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    forward = Forward(model)
    first_N = forward.measure(rollouts_of(), Needs.SAMPLED).logprobs_N
    assert torch.equal(first_N, forward.measure(rollouts_of(), Needs.SAMPLED).logprobs_N)
    assert [module.training for module in model.modules()] == modes
    viewed_N = forward.view(rollouts_of(), tokens_of(rollouts_of()), Needs.SAMPLED).logprobs_N
    assert not torch.equal(first_N, viewed_N)


def test_building_a_forward_draws_no_random_number_and_leaves_no_hook() -> None:
    model = tiny_model("gpt2").train()
    state = torch.get_rng_state()
    Forward(model, layout="packed")
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in model.modules())


def test_no_tokens_are_zero_rows() -> None:
    forward = Forward(tiny_model())
    for rollouts in ([], rollouts_of([(3, 0), (2, 0)])):
        assert forward.hidden(rollouts).shape == (0, 32)
        measured = forward.measure(rollouts, Needs.FULL, top_k=3)
        assert measured.topk_ids_NK is not None and measured.topk_ids_NK.shape == (0, 3)
        assert forward.view(rollouts, tokens_of(rollouts), Needs.FULL).full_logprobs_NV.shape == (0, VOCAB)
        assert forward.reverse_kl(rollouts, forward).shape == (0,)


@pytest.mark.parametrize("arrangement", ["padded", "packed"])
def test_a_response_token_is_predicted_one_place_before_its_own(arrangement: Any) -> None:
    layout = lay_out([[10, 11, 12], [20, 21]], [1, 1], arrangement)
    before = layout.input_ids_BT.flatten()[layout.predicted_at_N]
    assert before.tolist() == [10, 11, 20]


def test_an_adapter_on_the_head_is_read_and_trained() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        tiny_model("llama").double(), LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    ).double()
    rollouts = rollouts_of()
    view = Forward(model, tile_tokens=8).view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
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
    refused(tiny_model("llama"), "tile_tokens = 0", tile_tokens=0)


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


def test_rollouts_that_cannot_be_read_are_refused() -> None:
    forward = Forward(tiny_model(), vocab_size=200)
    with pytest.raises(DataError, match=r"r0 has 257 tokens \(7 of prompt\).* at most 256"):
        forward.hidden(rollouts_of([(7, 250)]))
    with pytest.raises(DataError, match="nothing predicts its first token"):
        forward.hidden(rollouts_of([(0, 3)]))
    with pytest.raises(DataError, match="another tokenizer"):
        forward.hidden(rollouts_of([(3, 50)], vocab=10_000))
    with pytest.raises(VocabularyError, match="vocabulary has 200"):
        forward.measure(rollouts_of([(3, 50)]), Needs.SAMPLED)
    with pytest.raises(AssertionError, match="not the responses"):
        forward.view(rollouts_of(vocab=200), tokens_of(rollouts_of(seed=1, vocab=200)), Needs.SAMPLED)


def test_numbers_that_are_not_finite_are_refused() -> None:
    model = tiny_model()
    forward = Forward(model)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(TrainingDiverged, match="not finite"):
        forward.measure(rollouts_of(), Needs.SAMPLED)
    refused(broken, "not finite")
