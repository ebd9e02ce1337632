"""The student's forward pass says what the model's own logits say, in any layout, batch or tile."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.model.cases import LENGTHS, assert_same_gradients, gradients, plain, rollouts_of, tokens_of, written
from tests.tiny import VOCAB, tiny_model
from tropd.errors import ConfigError, DataError, EvidenceError, TrainingDiverged, VocabularyError
from tropd.model.forward import Forward
from tropd.model.layout import lay_out
from tropd.model.tiling import Tiling
from tropd.objective.evidence import Needs
from tropd.types import Author

FAMILIES = ["qwen3", "llama", "gpt2", "gemma2", "cohere", "granite"]
IN_FLOAT32 = {"gemma2": 1e-6, "cohere": 1e-6}
"""Families whose own norms or attention are taken in float32 in a float64 model: all that can be asked of them."""


@pytest.mark.parametrize("layout", ["padded", "packed", "best"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_are_the_models_own(family: str, tied: bool, layout: Any) -> None:
    rollouts = rollouts_of()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, IN_FLOAT32.get(family, 1e-10))):
        model = tiny_model(family, tied=tied, sharp=8.0).to(dtype)
        forward = Forward(model, layout=layout, tiling=Tiling(tile_tokens=4))
        with torch.no_grad():
            expected_N = written(rollouts, plain(model, rollouts))
        assert expected_N.std() > 0.01
        viewed_N = forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N
        measured_N = forward.measure(rollouts, Needs.SAMPLED).logprobs_N
        assert viewed_N.dtype == measured_N.dtype == dtype
        torch.testing.assert_close(viewed_N, expected_N, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(viewed_N, measured_N, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "best"])
def test_sequences_do_not_see_each_other_in_sliding_windows(layout: Any) -> None:
    model = tiny_model("gemma2", sharp=1.0, sliding_window=4).double()
    rollouts = rollouts_of()
    measured_N = Forward(model, layout=layout).measure(rollouts, Needs.SAMPLED).logprobs_N
    with torch.no_grad():
        expected_N = written(rollouts, plain(model, rollouts))
        model.config.sliding_window = 4096
        blind_N = written(rollouts, plain(model, rollouts))
    torch.testing.assert_close(measured_N, expected_N, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(measured_N, blind_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "packed", "best"])
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
        forward = Forward(model, layout=layout, tiling=Tiling(tile_tokens=tile_tokens))
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


@pytest.mark.parametrize("layout", ["padded", "packed", "best"])
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
    view = Forward(model, layout=layout, tiling=Tiling(tile_tokens=8)).view(rollouts, tokens, needs)
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
    forward = Forward(model, tiling=Tiling(tile_tokens=8))
    wanted = gradients(model, forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N.sum())
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients(model, forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N.sum())
    assert len(calls) == (2 if train else 1)
    assert_same_gradients(found, wanted, 1e-12)


def test_reverse_kl_is_the_sum_over_the_whole_vocabulary() -> None:
    student, teacher = tiny_model("qwen3").double(), tiny_model("gpt2", seed=1).double()
    rollouts = rollouts_of()
    with torch.no_grad():
        student_NV, teacher_NV = plain(student, rollouts), plain(teacher, rollouts)
    expected_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    found_N = Forward(student, tiling=Tiling(tile_tokens=4)).reverse_kl(rollouts, Forward(teacher))
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-10)
    assert torch.equal(Forward(student).reverse_kl(rollouts, Forward(student)), torch.zeros_like(found_N))
    with pytest.raises(VocabularyError, match=f"{VOCAB} and 100"):
        Forward(student).reverse_kl(rollouts, Forward(teacher, vocab_size=100))


def test_reverse_kl_to_a_teacher_that_reads_another_prompt_is_to_what_it_says_there() -> None:
    """Longer and shorter prompts than the student's; a copy of the student with another prompt is another teacher."""
    student, rollouts = tiny_model("qwen3").double(), rollouts_of()
    told = [
        dataclasses.replace(
            r,
            prompt=dataclasses.replace(r.prompt, token_ids=prompt),
            token_ids=(*prompt, *r.response_ids),
            authors=(Author.CONTEXT,) * len(prompt) + r.authors[len(r.prompt.token_ids) :],
            behavior_logprobs=(0.0,) * (len(prompt) + len(r.response_ids)),
        )
        for n, r in enumerate(rollouts)
        for prompt in [((7, 8, 9, 10, 11) * n)[: 3 * n] or (12,)]
    ]
    with torch.no_grad():
        student_NV, teacher_NV = plain(student, rollouts), plain(student, told)
    expected_N = (student_NV.exp() * (student_NV - teacher_NV)).sum(-1)
    found_N = Forward(student, tiling=Tiling(tile_tokens=4)).reverse_kl(rollouts, Forward(student), told)
    torch.testing.assert_close(found_N, expected_N, rtol=1e-10, atol=1e-10)
    assert float(found_N.mean()) > 0.1


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


def test_no_tokens_are_zero_rows() -> None:
    forward = Forward(tiny_model())
    for rollouts in ([], rollouts_of([(3, 0), (2, 0)])):
        assert forward.hidden(rollouts).shape == (0, 32)
        measured = forward.measure(rollouts, Needs.FULL, top_k=3)
        assert measured.topk_ids_NK is not None and measured.topk_ids_NK.shape == (0, 3)
        assert forward.view(rollouts, tokens_of(rollouts), Needs.FULL).full_logprobs_NV.shape == (0, VOCAB)
        assert forward.reverse_kl(rollouts, forward).shape == (0,)


@pytest.mark.parametrize("arrangement", ["padded", "packed", "best"])
def test_a_response_token_is_predicted_one_place_before_its_own(arrangement: Any) -> None:
    layout = lay_out([[10, 11, 12], [20, 21]], [1, 1], arrangement)
    before = layout.input_ids_BT.flatten()[layout.predicted_at_N]
    assert before.tolist() == [10, 11, 20]


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
    with pytest.raises(ConfigError, match="not finite"):
        Forward(broken)


def test_a_token_that_cannot_be_drawn_adds_nothing() -> None:
    student, teacher = tiny_model("llama").double(), tiny_model("llama", seed=1).double()
    for model in (student, teacher):
        weight_VH = model.lm_head.weight
        model.lm_head = nn.Linear(32, VOCAB, bias=True, dtype=torch.float64)
        with torch.no_grad():
            model.lm_head.weight.copy_(weight_VH)
    forwards = Forward(student), Forward(teacher)
    rollouts = rollouts_of(vocab=VOCAB - 1)
    with torch.no_grad():
        for model in (student, teacher):
            model.lm_head.bias[VOCAB - 1] = float("-inf")
        student_NV, teacher_NV = (plain(model, rollouts)[:, :-1] for model in (student, teacher))
    kl_N = forwards[0].reverse_kl(rollouts, forwards[1])
    measured = forwards[0].measure(rollouts, Needs.STUDENT_ENTROPY)
    torch.testing.assert_close(kl_N, (student_NV.exp() * (student_NV - teacher_NV)).sum(-1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(measured.logprobs_N, written(rollouts, student_NV), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(measured.entropy_N, -(student_NV.exp() * student_NV).sum(-1), rtol=1e-10, atol=1e-10)
