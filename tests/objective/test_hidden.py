"""Hidden states that are compared: half precision, bridges between widths, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.objective.cases import F64, close
from tropd.errors import ConfigError, EvidenceError
from tropd.objective import Bridge, HiddenMatch, StudentView, Tokens
from tropd.objective.examples import some_tokens
from tropd.objective.hidden import layer_numbers


def states(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def both(student: Tensor, teacher: Tensor) -> tuple[Tokens, StudentView]:
    """One column each of several layers [N, L, H]."""
    tokens = some_tokens(teacher_logprobs_N=torch.zeros(len(student))).with_(columns={"states_all": teacher})
    return tokens, StudentView(logprobs_N=torch.zeros(len(student)), columns={"states_all": student})


def match(student: Tensor, teacher: Tensor, **knobs) -> Tensor:
    return HiddenMatch("all", **knobs)(*both(student, teacher), None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_states_are_compared_in_single(dtype) -> None:
    s, t = states(0, 5, 3, 8), states(1, 5, 3, 8)
    half = match(s.to(dtype), t.to(dtype))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), match(s, t), rtol=0.02, atol=0.02)


def test_equal_states_are_at_distance_zero_without_a_gradient_even_if_all_are_zero() -> None:
    for x in (states(0, 5, 3, 8), torch.zeros(5, 3, 8, dtype=F64)):
        for normalise in (False, True):
            s = x.clone().requires_grad_()
            loss = match(s, x, normalise=normalise)
            (gradient,) = torch.autograd.grad(loss.sum(), s)
            assert not bool(loss.any()) and not bool(gradient.any())


def test_a_bridge_keeps_the_directions_in_which_the_teacher_varies_most() -> None:
    t = states(1, 60, 2, 6) * torch.tensor([5.0, 4.0, 1e-3, 1e-3, 1e-3, 1e-3])
    bridge = Bridge.fit(states(0, 60, 2, 9), t, rank=2)
    kept = bridge.teacher_map_LHR
    close(kept.mT @ kept, torch.eye(2, dtype=F64).expand(2, 2, 2), 1e-10)
    assert float(kept[:, 2:].abs().max()) < 1e-2


def test_a_student_that_is_a_linear_image_of_its_teacher_is_at_distance_zero_across_the_bridge(tmp_path: Path) -> None:
    """And the gradient is that of the difference after two fixed maps."""
    t = states(1, 60, 2, 6)
    s = t @ states(2, 6, 9) + 3.0
    bridge = Bridge.fit(s, t, rank=4)
    bridge.save(path := tmp_path / "bridge.pt")
    assert float(match(s, t, bridge=str(path)).max()) < 1e-20
    moved = (s + states(3, 60, 2, 9)).requires_grad_()
    ours = match(moved, t, bridge=str(path))
    guess = torch.einsum("nlh,lhr->nlr", moved - s.mean(0), bridge.student_map_LHR)
    truth = torch.einsum("nlh,lhr->nlr", t - t.mean(0), bridge.teacher_map_LHR)
    plain = ((guess - truth) ** 2).mean((1, 2))
    close(ours, plain, 1e-10)
    close(*(torch.autograd.grad(x.sum(), moved, retain_graph=True)[0] for x in (ours, plain)), 1e-10)


def test_no_other_linear_guess_of_the_student_is_better_than_the_bridges() -> None:
    s, t = states(0, 60, 1, 5), states(1, 60, 1, 7)
    bridge = Bridge.fit(s, t, rank=3)

    def error(change: float) -> float:
        nudged = Bridge(
            bridge.student_mean_LH,
            bridge.student_map_LHR + change * states(5, 1, 5, 3),
            bridge.teacher_mean_LH,
            bridge.teacher_map_LHR,
        )
        guess, truth = nudged.cross(s, t)
        return float(((guess - truth) ** 2).sum())

    assert error(0.0) < min(error(1e-3), error(-1e-3))


def test_bridges_that_cannot_be_are_refused(tmp_path: Path) -> None:
    s, t = states(0, 10, 2, 5), states(1, 10, 2, 7)
    for rank in (0, 8):
        with pytest.raises(ConfigError, match=f"rank {rank} .* 10 tokens with states of 7"):
            Bridge.fit(s, t, rank=rank)
    bridge = Bridge.fit(s, t, rank=3)
    with pytest.raises(EvidenceError, match=r"fitted for \(2, 5\).* of the student, which has \(2, 6\)"):
        bridge.cross(states(0, 10, 2, 6), t)
    with pytest.raises(ConfigError, match="cannot be read"):
        match(s, t, bridge=str(tmp_path / "none.pt"))
    with pytest.raises(EvidenceError, match="states of 5 and 7 numbers"):
        match(s, t)


def test_layers_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(ConfigError, match="the odd layers of a model with 1"):
        layer_numbers("odd", 1)
