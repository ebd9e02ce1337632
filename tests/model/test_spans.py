"""Sequences in one row that attend within their own spans."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.model.cases import assert_same_gradients, gradients, rollouts_of, tokens_of
from tests.tiny import tiny_model
from tropd.model.forward import Forward
from tropd.model.hf import recomputes
from tropd.model.spans import worth_it
from tropd.objective.evidence import Needs

RAGGED = [(2, 3), (4, 17), (1, 30)]
PLAIN = ["qwen3", "llama", "gpt2", "granite"]


def tokens_seen(forward: Forward, lengths: list[tuple[int, int]] = RAGGED) -> int:
    """Tokens that the backbone's first matrix product is given."""
    seen = []
    first = next(m for m in forward.backbone.modules() if isinstance(m, nn.Linear) or "Conv1D" in type(m).__name__)
    with first.register_forward_hook(lambda module, given, output: seen.append(output.shape[:-1].numel())):
        forward.hidden(rollouts_of(lengths))
    return seen[0]


@pytest.mark.parametrize("family", PLAIN)
def test_ragged_sequences_cost_their_own_tokens_alone(family: str) -> None:
    assert tokens_seen(Forward(tiny_model(family))) == sum(map(sum, RAGGED))
    assert tokens_seen(Forward(tiny_model(family), layout="padded")) == 3 * max(map(sum, RAGGED))


def test_sequences_of_about_one_length_stay_a_rectangle() -> None:
    assert tokens_seen(Forward(tiny_model("llama")), [(2, 30), (2, 31)]) == 2 * 33
    assert not worth_it([32, 33]) and worth_it([10, 33])


@pytest.mark.parametrize("family", PLAIN)
def test_gradients_are_those_of_the_padded_rectangle(family: str) -> None:
    model, rollouts = tiny_model(family).double(), rollouts_of(RAGGED)
    found = {}
    for layout in ("padded", "best"):
        view = Forward(model, layout=layout).view(rollouts, tokens_of(rollouts), Needs.SAMPLED)
        found[layout] = gradients(model, view.logprobs_N.square().sum())
    assert_same_gradients(found["best"], found["padded"], 1e-9)


def test_what_one_sequence_says_does_not_depend_on_its_neighbours() -> None:
    forward, rollouts = Forward(tiny_model("qwen3")), rollouts_of(RAGGED)
    others = rollouts_of(RAGGED, seed=1)
    with torch.no_grad():
        before = forward.hidden(rollouts)[:3]
        after = forward.hidden([rollouts[0], *others[1:]])[:3]
    assert torch.equal(before, after)


def test_layers_that_look_through_windows_are_padded() -> None:
    assert not Forward(tiny_model("gemma2")).by_span


def test_layers_that_run_again_in_backward_are_padded() -> None:
    model = tiny_model("llama").train()
    model.gradient_checkpointing_enable()
    forward = Forward(model)
    assert recomputes(forward.backbone)
    assert tokens_seen(forward) == 3 * max(map(sum, RAGGED))


def test_the_models_own_attention_is_back_afterwards() -> None:
    model = tiny_model("llama")
    before = model.config._attn_implementation
    Forward(model).hidden(rollouts_of(RAGGED))
    assert model.config._attn_implementation == before
