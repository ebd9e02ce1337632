"""Pieces that look at several readers: what they weigh and pull, by hand, with zeros, absent readers and ranks."""

from __future__ import annotations

import math
import threading

import pytest
import torch
from torch import Tensor

from tests.objective.cases import F64, close, make_case
from tests.objective.ranks import Ranks, local
from tropd.errors import ConfigError
from tropd.objective import (
    Agreement,
    AtMost,
    Context,
    ContrastiveHinge,
    NegativeLogLikelihood,
    Objective,
    PolicyGradient,
    StudentView,
    Term,
    Tokens,
)
from tropd.objective.agreement import spread_of
from tropd.objective.evidence import Needs
from tropd.objective.examples import some_tokens
from tropd.objective.selectors import STUDENT

ZERO = -math.inf
THREE = ("a", "b", "c")


def told(tokens: Tokens, **said: Tensor | list[float]) -> Tokens:
    for name, logprobs_N in said.items():
        tokens = tokens.told(name, teacher_logprobs_N=torch.as_tensor(logprobs_N))
    return tokens


def three_readers(spread: float = 1.0) -> Tokens:
    """A case whose three readers say what the teacher says, and as much more as a random number each."""
    case = make_case()
    noise = spread * torch.randn(3, len(case.tokens), generator=torch.Generator().manual_seed(1), dtype=F64)
    said = case.tokens.teacher_logprobs_N + noise - noise.amax(0).clamp_min(0)
    return told(case.tokens, **dict(zip(THREE, said, strict=True)))


@pytest.mark.parametrize("spread", ["variance", "range"])
@pytest.mark.parametrize("per", ["token", "sequence"])
def test_the_agreement_weight_is_one_where_all_say_the_same(spread, per) -> None:
    tokens = told(make_case().tokens, **dict.fromkeys(THREE, torch.full((26,), -1.5)))
    assert torch.equal(Agreement(THREE, gamma=3.0, spread=spread, per=per)(tokens, Context()), torch.ones(26))


@pytest.mark.parametrize("spread", ["variance", "range"])
def test_the_agreement_weight_falls_as_the_readers_differ_and_stops_at_the_floor(spread) -> None:
    gaps = [0.0, 0.0, 0.1, 0.5, 1.0, 4.0, 9.0]
    tokens = told(some_tokens(teacher_logprobs_N=[-1.0] * 7), other=[-1.0 - gap for gap in gaps])
    weights = Agreement(("teacher", "other"), gamma=2.0, spread=spread)(tokens, Context()).tolist()
    assert weights[0] == weights[1] == 1.0 and weights[1:] == sorted(weights[1:], reverse=True)
    assert len(set(weights[1:])) == 6
    floored = Agreement(("teacher", "other"), gamma=1e6, floor=0.2, spread=spread)(tokens, Context())
    assert floored.tolist()[2:] == pytest.approx([0.2] * 5)


@pytest.mark.parametrize("spread", ["variance", "range"])
def test_the_agreement_weight_of_a_token_is_the_papers_by_hand(spread) -> None:
    tokens = three_readers()
    said = torch.stack([tokens.of(name).teacher_logprobs_N for name in THREE])
    d = said.var(0, unbiased=False) if spread == "variance" else said.max(0).values - said.min(0).values
    unit = torch.quantile(d[tokens.authors_N == 1], 0.95)
    by_hand = (1 / (1 + 0.7 * (d / unit).clamp(max=1.5))).clamp(min=0.01)
    close(Agreement(THREE, gamma=0.7, spread=spread, cap=1.5)(tokens, Context()), by_hand, 1e-12)


def test_the_agreement_weight_of_a_sequence_is_the_papers_by_hand() -> None:
    tokens = three_readers()
    weight_N = Agreement(THREE, gamma=0.7, per="sequence")(tokens, Context())
    for s in range(6):
        rows = (tokens.sequences_N == s) & (tokens.authors_N == 1)
        means = torch.stack([tokens.of(name).teacher_logprobs_N[rows].mean() for name in THREE])
        by_hand = math.exp(-0.7 * float(means.var(unbiased=False))) if bool(rows.any()) else 1.0
        assert weight_N[tokens.sequences_N == s].tolist() == pytest.approx(
            [by_hand] * int((tokens.sequences_N == s).sum())
        )


def test_the_quantile_is_that_of_the_whole_batch_on_any_number_of_ranks() -> None:
    tokens, piece = three_readers(), Agreement(THREE, gamma=1.0)
    alone, world = piece(tokens, Context()), Ranks(2)
    rows = [torch.isin(tokens.sequences_N, torch.tensor(s)).nonzero().flatten() for s in ([0, 3], [1, 2, 4, 5])]
    found: list = [None, None]

    def weigh(rank: int) -> None:
        part = local(tokens, rows[rank])
        found[rank] = piece(part, Context(world=world.member(rank)))

    threads = [threading.Thread(target=weigh, args=(rank,)) for rank in range(2)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for rank in range(2):
        close(found[rank], alone[rows[rank]], 1e-12)


@pytest.mark.parametrize("spread", ["variance", "range"])
def test_readers_that_give_no_probability_agree_if_all_do_and_differ_most_if_some_do(spread) -> None:
    said = torch.tensor([[ZERO, ZERO, -1.0], [ZERO, -1.0, -2.0]])
    assert spread_of(said, spread).tolist()[:2] == [0.0, math.inf]
    tokens = told(some_tokens(teacher_logprobs_N=[ZERO, ZERO, -1.0]), other=[ZERO, -1.0, -2.0])
    weights = Agreement(("teacher", "other"), gamma=0.1, spread=spread)(tokens, Context()).tolist()
    assert weights == pytest.approx([1.0, 1 / (1 + 0.1 * 10), 1 / (1 + 0.1 / 0.95)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_agreement_of_half_precision_is_computed_in_single(dtype) -> None:
    tokens = told(some_tokens(teacher_logprobs_N=torch.tensor([-1.0, -8.0]).to(dtype)), other=[-1.0, -8.5])
    weight_N = Agreement(("teacher", "other"), gamma=1.0)(tokens, Context())
    assert weight_N.dtype == torch.float32 and weight_N.tolist() == pytest.approx([1.0, 1 / (1 + 1 / 0.95)])


def test_agreement_asks_each_reader_for_the_written_token_only() -> None:
    objective = Objective(Term("t", STUDENT & Agreement(("teacher", *THREE)), NegativeLogLikelihood(), over="members"))
    assert objective.asks == dict.fromkeys(("teacher", *THREE), Needs.SAMPLED) | {"teacher": Needs.SAMPLED}
    assert objective.readers == ("a", "b", "c", "teacher")


def test_a_response_that_one_reader_did_not_read_has_no_weight() -> None:
    tokens = three_readers()
    read_S = torch.tensor([True, True, False, True, True, True])
    objective = Objective(Term("t", STUDENT & Agreement(THREE), NegativeLogLikelihood(), over="members"))
    weight_N = objective.plan(tokens.told("b", read_S=read_S)).weights["t"]
    assert not bool(weight_N[tokens.sequences_N == 2].any())
    assert float(weight_N.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("readers", [(), ("a",), ("a", "a")])
def test_the_agreement_of_fewer_than_two_is_refused(readers) -> None:
    with pytest.raises(ConfigError, match="two or more"):
        Agreement(readers)


def hinge(s: float, good: float, bad: float, margin: float = 0.1) -> tuple[float, float]:
    logprobs_N = torch.tensor([s], dtype=F64, requires_grad=True)
    tokens = told(some_tokens(teacher_logprobs_N=torch.tensor([good], dtype=F64)), bad=torch.tensor([bad], dtype=F64))
    loss_N = ContrastiveHinge(margin=margin)(tokens, StudentView(logprobs_N=logprobs_N), None)
    (gradient,) = torch.autograd.grad(loss_N.sum(), logprobs_N)
    return float(loss_N.detach()), float(gradient)


def test_the_hinge_pulls_towards_the_good_reader_and_away_from_the_bad_one_until_the_margin() -> None:
    for s, good, bad in ((-2.0, -1.0, -3.0), (-1.2, -1.0, -3.0), (-2.5, -3.0, -1.0), (-4.0, -1.0, -1.5)):
        value, gradient = hinge(s, good, bad)
        by_hand = max(0.0, 0.1 + abs(s - good) - abs(s - bad))
        step = 1e-6
        ends = [max(0.0, 0.1 + abs(x - good) - abs(x - bad)) for x in (s + step, s - step)]
        assert value == pytest.approx(by_hand) and gradient == pytest.approx((ends[0] - ends[1]) / (2 * step))
    assert hinge(-1.2, -1.0, -3.0) == (0.0, 0.0)
    assert hinge(-2.0, -1.0, -3.0)[1] == -2.0  # a step makes the token likelier, as the good reader says


def test_a_token_of_which_both_readers_say_the_same_is_neither_pulled_nor_pushed() -> None:
    assert hinge(-2.0, -1.0, -1.0) == (pytest.approx(0.1), 0.0)
    assert hinge(-2.0, ZERO, ZERO) == (pytest.approx(0.1), 0.0)


def test_a_token_that_the_bad_reader_cannot_write_is_far_enough_from_it() -> None:
    assert hinge(-2.0, -1.0, ZERO) == (0.0, 0.0)


def test_a_reward_is_read_from_the_reader_of_its_loss_clamped_or_not() -> None:
    tokens = three_readers()
    with_student = tokens.with_(student_logprobs_N=tokens.behavior_logprobs_N)
    loss = PolicyGradient(reader="b")
    for piece in (loss, AtMost(loss, nats=5.0)):
        plan = Objective(Term("t", STUDENT, piece)).plan(with_student)
        expected = tokens.of("b").teacher_logprobs_N - with_student.student_logprobs_N
        close(plan.rewards["t"], torch.where(plan.weights["t"] > 0, expected, 0.0), 1e-12)
