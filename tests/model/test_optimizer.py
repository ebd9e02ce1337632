"""No update is lost, none is made up, and a resumed optimiser goes on where the saved one was."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tropd.config.stages import OptimizerConfig
from tropd.errors import CheckpointError
from tropd.model.optimizer import Optimizer, learning_rate

STEADY = OptimizerConfig(learning_rate=1e-5, max_gradient_norm=1e9)


def layer(dtype: torch.dtype) -> nn.Linear:
    module = nn.Linear(4, 4, bias=False, dtype=dtype)
    nn.init.constant_(module.weight, 1.0)
    return module


def push(module: nn.Module, optimizer: Optimizer, value: float = 1.0) -> tuple[float, float]:
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, value)
    return optimizer.step()


def test_an_update_of_1e_minus_5_of_a_bfloat16_weight_is_kept_until_it_shows() -> None:
    module = layer(torch.bfloat16)
    optimizer = Optimizer(module, STEADY, 400)
    push(module, optimizer)
    assert torch.equal(module.weight, torch.ones_like(module.weight)), "below the precision of bfloat16 at 1"
    torch.testing.assert_close(optimizer.masters["weight"], torch.full((4, 4), 1 - 1e-5), rtol=0, atol=1e-7)
    for _ in range(399):
        push(module, optimizer)
    torch.testing.assert_close(optimizer.masters["weight"], torch.full((4, 4), 1 - 4e-3), rtol=0, atol=1e-5)
    assert torch.equal(module.weight, optimizer.masters["weight"].bfloat16()) and (module.weight < 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), (float("inf"), 2.0, 3.0), (1.0, float("nan"), 3.0)])
def test_a_restored_optimizer_goes_on_bit_for_bit_even_after_a_skipped_update(
    dtype: torch.dtype, values: tuple[float, ...]
) -> None:
    straight, first, second = layer(dtype), layer(dtype), layer(dtype)
    config = OptimizerConfig(learning_rate=1e-2, schedule="linear")
    alone, before, after = (Optimizer(module, config, 10) for module in (straight, first, second))
    for value in (*values, 4.0, 5.0):
        push(straight, alone, value)
    for value in values:
        push(first, before, value)
    second.load_state_dict(first.state_dict())
    after.load_state_tensors({name: x.clone() for name, x in before.state_tensors().items()}, before.num_steps)
    for value in (4.0, 5.0):
        push(second, after, value)
    assert torch.equal(second.weight, straight.weight)
    own, others = alone.state_tensors(), after.state_tensors()
    assert own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_gradient_changes_no_weight_and_no_moment(value: float) -> None:
    module = layer(torch.float32)
    optimizer = Optimizer(module, STEADY, 10)
    push(module, optimizer)
    before = {name: x.clone() for name, x in optimizer.state_tensors().items()} | {"weight": module.weight.clone()}
    norm, _ = push(module, optimizer, value)
    assert not torch.isfinite(torch.tensor(norm))
    assert all(torch.equal(x, before[name]) for name, x in optimizer.state_tensors().items())
    assert torch.equal(module.weight, before["weight"])


def test_the_state_of_another_optimizer_is_refused() -> None:
    small, large = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=True)
    optimizer = Optimizer(small, STEADY, 10)
    push(small, optimizer)
    state = optimizer.state_tensors()
    with pytest.raises(CheckpointError, match=r"differ in 'exp_avg.bias' and 2 more"):
        Optimizer(large, STEADY, 10).load_state_tensors(state, 1)
    with pytest.raises(CheckpointError, match=r"differ in 'master.weight'.*another precision"):
        Optimizer(layer(torch.bfloat16), STEADY, 10).load_state_tensors(state, 1)


def test_learning_rates_warm_up_and_end_at_nothing() -> None:
    for schedule, middle in (("constant", 1.0), ("linear", 0.5), ("cosine", 0.5)):
        config = OptimizerConfig(learning_rate=1.0, schedule=schedule, warmup_steps=2)
        rates = [learning_rate(config, step, 12) for step in range(13)]
        assert rates[:3] == [0.5, 1.0, 1.0]
        assert rates[7] == pytest.approx(middle)
        assert rates[12] == pytest.approx(1.0 if schedule == "constant" else 0.0)
