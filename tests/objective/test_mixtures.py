"""One distribution of several: what a mean and a steered difference are, and what they are at their limits."""

from __future__ import annotations

import math

import pytest
import torch

from tests.objective.cases import F64
from tropd.briefings.mixtures import Mean, Steered, mixture_of
from tropd.errors import ConfigError, OutOfRange
from tropd.objective.support import NOTHING

NAMES = ("a", "b", "c", "d")


def some(dtype: torch.dtype = F64, rows: int = 5, size: int = 7) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return {name: (2 * torch.randn(rows, size, generator=g, dtype=dtype)).log_softmax(-1) for name in NAMES}


def test_the_mean_of_probabilities_is_taken_token_by_token() -> None:
    q = some()
    found = Mean(of=NAMES)(q)
    for n in range(5):
        for v in range(7):
            assert float(found[n, v]) == pytest.approx(math.log(sum(float(q[x][n, v].exp()) for x in NAMES) / 4))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(5, dtype=F64))


def test_the_mean_of_one_is_that_one_to_the_last_bit() -> None:
    for dtype in (torch.float32, F64):
        assert torch.equal(Mean(of=("b",))(some(dtype)), some(dtype)["b"])


def test_steered_with_strength_0_is_its_base_to_the_last_bit() -> None:
    for dtype in (torch.float32, F64):
        steered = Steered(base="a", plus=("b", "c"), minus=("d",), strength=0.0)
        assert torch.equal(steered(some(dtype)), some(dtype)["a"])


def test_steered_is_the_softmax_of_the_base_and_a_difference_of_means() -> None:
    q, strength = some(), 0.7
    found = Steered(base="a", plus=("b", "c"), minus=("d",), strength=strength)(q)
    for n in range(5):
        z = [
            float(q["a"][n, v]) + strength * ((float(q["b"][n, v]) + float(q["c"][n, v])) / 2 - float(q["d"][n, v]))
            for v in range(7)
        ]
        total = math.log(sum(map(math.exp, z)))
        assert found[n].tolist() == pytest.approx([x - total for x in z])


def test_logits_steer_as_log_probabilities_do() -> None:
    g = torch.Generator().manual_seed(4)
    logits = {name: 3 * torch.randn(5, 7, generator=g, dtype=F64) for name in NAMES}
    steered = Steered(base="a", plus=("b",), minus=("c", "d"), strength=1.5)
    by_logprobs = steered({name: z.log_softmax(-1) for name, z in logits.items()})
    torch.testing.assert_close(steered(logits), by_logprobs)


def test_equal_groups_steer_nowhere() -> None:
    q = some()
    torch.testing.assert_close(Steered(base="a", plus=("b",), minus=("b",), strength=4.0)(q), q["a"])


def test_a_probability_of_0_stays_finite_wherever_it_can() -> None:
    def logprobs(*p: float) -> torch.Tensor:
        return torch.tensor([p], dtype=F64).log()

    steered = Steered(base="base", plus=("plus",), minus=("minus",), strength=0.5)
    base, even = logprobs(0.5, 0.25, 0.25), logprobs(0.4, 0.3, 0.3)
    only_plus = steered({"base": base, "plus": even, "minus": logprobs(0.0, 0.5, 0.5)})
    assert only_plus.exp().tolist() == [[1.0, 0.0, 0.0]], "what only `minus` rule out gets all"
    only_minus = steered({"base": base, "plus": logprobs(0.0, 0.5, 0.5), "minus": even})
    torch.testing.assert_close(only_minus.exp(), torch.tensor([[0.0, 0.5, 0.5]], dtype=F64))
    neither = steered({"base": base, "plus": logprobs(0.0, 0.5, 0.5), "minus": logprobs(0.0, 0.5, 0.5)})
    torch.testing.assert_close(neither, base)
    unsaid = steered({"base": logprobs(0.0, 0.5, 0.5), "plus": even, "minus": logprobs(0.0, 0.5, 0.5)})
    torch.testing.assert_close(unsaid.exp(), torch.tensor([[0.0, 0.5, 0.5]], dtype=F64))
    assert Mean(of=("a", "b"))({"a": logprobs(0.0, 1.0), "b": logprobs(0.0, 1.0)}).exp().tolist() == [[0.0, 1.0]]
    assert NOTHING == -1e4, "the docstring says exp(-10000)"


def test_a_mixture_of_nothing_is_refused() -> None:
    for names in ((), ("a", "a")):
        with pytest.raises(ConfigError, match="Name one or more, each once"):
            Mean(of=names)
    for plus, minus in (((), ("a",)), (("a",), ())):
        with pytest.raises(ConfigError, match="one reader or more"):
            Steered(plus=plus, minus=minus)
    with pytest.raises(OutOfRange, match="strength"):
        Steered(plus=("a",), minus=("b",), strength=math.inf)
    with pytest.raises(ConfigError, match="not by both"):
        mixture_of(("a",), Steered(plus=("a",), minus=("b",)))
