"""How a batch is cut, padded, tiled or written changes nothing but time and memory.

Drawn tokens and trust are equal exactly.  Sums are equal up to the rounding of float32 in another order of addition:
a relative error of 1e-5 of the gradient's norm.  AdamW divides by the gradient's own size, which would make a step of
a rounding error where the gradient is 0; an epsilon far above such errors keeps the comparison of weights meaningful.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.one_step import Step, parts_of, step_of, write
from tests.small_runs import TROPD, write_models
from tropd.model.forward import Forward

METHODS: dict[str, dict[str, Any]] = {
    "tropd": TROPD,
    "mopd": {"name": "mopd", "top_k": 8},
    "entropy_opd": {"name": "entropy_opd"},
    "minillm": {"name": "minillm"},
}
CUTS: dict[str, dict[str, Any]] = {
    "one micro-batch": {"tokens_per_micro_batch": 10_000},
    "each rollout alone": {"tokens_per_micro_batch": 1},
    "tiles of one token": {"tile_tokens": 1},
    "tiles of seven tokens": {"tile_tokens": 7},
}
OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-2, "max_gradient_norm": 1e9}


def norm(x: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().pow(2).sum()) for g in x.values()))


def difference(x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, Tensor]:
    assert x.keys() == y.keys()
    return {name: x[name] - y[name] for name in x}


def assert_same_step(step: Step, other: Step) -> None:
    """To the bit where numbers decide, to rounding where they add up."""
    assert other.shares.keys() == step.shares.keys()
    for term, weights in step.shares.items():
        assert all(torch.equal(weights[id], other.shares[term][id]) for id in weights)
    assert other.sums.loss == pytest.approx(step.sums.loss, rel=1e-5, abs=1e-6)
    for name, part in step.sums.terms.items():
        assert other.sums.terms[name].loss == pytest.approx(part.loss, rel=1e-5, abs=1e-6)
        assert (other.sums.terms[name].tokens, other.sums.terms[name].weight) == (
            part.tokens,
            pytest.approx(part.weight),
        )
    assert norm(step.gradients) > 1e-2
    assert norm(difference(step.gradients, other.gradients)) < 1e-5 * norm(step.gradients)
    assert all(torch.allclose(x, other.weights[name], rtol=0, atol=1e-5) for name, x in step.weights.items())


@pytest.mark.parametrize("method", METHODS)
def test_a_step_is_the_same_however_it_is_cut(tmp_path: Path, method: str) -> None:
    folder = write_models(tmp_path)
    parts = parts_of(folder, METHODS[method], optimizer=OPTIMIZER)
    before = {name: p.detach().clone() for name, p in parts.model.named_parameters()}
    rollouts = write(parts)
    assert len({len(r.token_ids) for r in rollouts}) > 1
    whole = step_of(parts, rollouts)
    assert norm(difference(before, whole.weights)) > 1e-3
    num_parts = set()
    for cut in CUTS.values():
        step = step_of(parts_of(folder, METHODS[method], optimizer=OPTIMIZER, **cut), rollouts)
        num_parts.add(len(step.seen))
        assert_same_step(whole, step)
    assert {1, len(rollouts)} <= num_parts


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_packed_row_trains_as_padded_ones(tmp_path: Path, family: str) -> None:
    folder = write_models(tmp_path, family)
    padded = parts_of(folder, optimizer=OPTIMIZER)
    rollouts = write(padded)
    packed = parts_of(folder, optimizer=OPTIMIZER)
    for who in (packed.learner, packed.teacher):
        who.forward = Forward(
            who.forward.model, vocab_size=packed.vocab_size, tiling=who.forward.tiling, layout="packed"
        )
    assert_same_step(step_of(padded, rollouts), step_of(packed, rollouts))


def test_rollouts_and_their_step_do_not_depend_on_who_is_written_at_the_same_time(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    at_once = {"max_new_tokens": 28, "num_prompts": 5, "num_rollouts": 3}
    steps = []
    for max_batch in (64, 4, 1):
        parts = parts_of(folder, optimizer=OPTIMIZER, rollout={**at_once, "max_batch": max_batch})
        steps.append(step_of(parts))
    for step in steps[1:]:
        assert [r.id for r in step.rollouts] == [r.id for r in steps[0].rollouts]
        for one, other in zip(step.rollouts, steps[0].rollouts, strict=True):
            assert (one.token_ids, one.authors, one.finish) == (other.token_ids, other.authors, other.finish)
            assert one.behavior_logprobs == pytest.approx(other.behavior_logprobs, abs=1e-4)
        for term, weights in steps[0].shares.items():
            assert all(torch.equal(weights[id], step.shares[term][id]) for id in weights)
        # The sampler's log-probabilities differ in their last bits, and so do importance ratios.
        assert norm(difference(steps[0].gradients, step.gradients)) < 1e-4 * norm(steps[0].gradients)


def test_trust_is_drawn_both_ways_and_belongs_to_the_rollout_and_position(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    step = step_of(parts_of(folder, TROPD | {"guidance": False}, tokens_per_micro_batch=50))
    trusted = torch.cat(list(step.shares["trusted"].values())) > 0
    outlier = torch.cat(list(step.shares["outlier"].values())) > 0
    assert bool((trusted ^ outlier).all())
    assert 0 < int(trusted.sum()) < len(trusted)
    again = step_of(parts_of(folder, TROPD | {"guidance": False}, seed=1), step.rollouts)
    other = torch.cat([again.shares["trusted"][id] for id in step.shares["trusted"]]) > 0
    assert not torch.equal(trusted, other)


def test_the_order_of_rollouts_does_not_change_a_step(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    parts = parts_of(folder, optimizer=OPTIMIZER)
    rollouts = write(parts)
    turned = step_of(parts_of(folder, optimizer=OPTIMIZER), rollouts[::-1])
    assert_same_step(step_of(parts, rollouts), turned)


def test_a_mean_of_micro_batch_means_would_be_noticed(tmp_path: Path) -> None:
    """The classic mistake, on the same rollouts: the gradient of each rollout's own mean, averaged."""
    folder = write_models(tmp_path)
    changes: dict[str, Any] = {"optimizer": OPTIMIZER, "rollout": {"max_new_tokens": 40}}
    parts = parts_of(folder, {"name": "opd"}, **changes)
    rollouts = write(parts)
    lengths = [len(r.response_ids) for r in rollouts]
    assert max(lengths) > 1.5 * min(lengths)
    whole = step_of(parts, rollouts)
    alone = [step_of(parts_of(folder, {"name": "opd"}, **changes), [r]).gradients for r in rollouts]
    means = {name: sum(g[name] for g in alone) / len(alone) for name in whole.gradients}
    shares = {
        name: sum(n * g[name] for n, g in zip(lengths, alone, strict=True)) / sum(lengths) for name in whole.gradients
    }
    assert norm(difference(whole.gradients, shares)) < 1e-5 * norm(whole.gradients)
    assert norm(difference(whole.gradients, means)) > 1e-2 * norm(whole.gradients)
