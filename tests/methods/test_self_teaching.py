"""What self-teaching methods say of their readers and terms, and which simpler methods they become at their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.objective.cases import K, make_case
from tropd.briefings.briefing import WithColumn, WithDemonstrations, WithFeedback, WithPeers, WithSystem
from tropd.briefings.follow import Ema, Frozen, Gated
from tropd.errors import ConfigError
from tropd.methods import CGTR, METHODS, OPRD, OPSD, PTD, SDFT, SDPO, Method, MultiRollout, UniSD
from tropd.objective import (
    Agreement,
    ContrastiveHinge,
    ForwardKL,
    HiddenMatch,
    JensenShannon,
    Needs,
    Objective,
    ReverseKL,
    Term,
)
from tropd.objective.context import Context
from tropd.objective.losses import ImportanceWeighted, PolicyGradient
from tropd.objective.rewards import GroupAdvantage
from tropd.objective.selectors import STUDENT
from tropd.types import READER

OFF: dict[str, Any] = {"contexts": 0, "decay": 1.0, "contrast": 0.0, "features": 0.0}


@pytest.mark.parametrize(("alpha", "base"), [(0.0, ForwardKL()), (1.0, ReverseKL()), (0.3, JensenShannon(beta=0.3))])
def test_unisd_with_all_parts_off_is_its_base_loss_to_the_start_told_the_solution(alpha: float, base: Any) -> None:
    method = UniSD(alpha=alpha, **OFF)
    assert method.objective == Objective(Term("divergence", STUDENT, base))
    assert list(method.readers) == ["teacher"]
    teacher = method.readers["teacher"]
    assert (teacher.model, teacher.briefing, teacher.follow) == ("start", WithColumn(column="solution"), Frozen())


@pytest.mark.parametrize(
    ("part", "adds", "readers"),
    [
        ({"contexts": 3}, Agreement, {"context_0", "context_1", "context_2"}),
        ({"contrast": 0.01}, ContrastiveHinge, {"bad"}),
        ({"features": 0.01}, HiddenMatch, set()),
    ],
)
def test_each_part_of_unisd_adds_its_piece_and_its_readers_alone(part: Any, adds: type, readers: set[str]) -> None:
    method = UniSD(**{**OFF, **part})
    pieces = [p for t in method.objective.terms for w in (t.where, t.loss) for p in (w, *w.parts())]
    kinds = (Agreement, ContrastiveHinge, HiddenMatch)
    assert {type(piece) for piece in pieces if isinstance(piece, kinds)} == {adds}
    assert set(method.readers) - {"teacher"} == readers == set(method.objective.readers) - {"teacher"}


def test_agreement_of_contexts_that_say_the_same_weighs_nothing() -> None:
    case = make_case()
    same = {name: case.tokens.peek(name) for name in ("teacher_logprobs_N",)}
    tokens = case.tokens
    for context in range(3):
        tokens = tokens.told(f"context_{context}", **same)
    found, plain = UniSD(**{**OFF, "contexts": 3}).objective, UniSD(**OFF).objective
    weighed = found.plan(tokens, Context()).weights["divergence"]
    every = plain.plan(tokens, Context()).weights["divergence"]
    torch.testing.assert_close(weighed / weighed.sum(), every / every.sum())


def test_contexts_of_unisd_are_told_other_examples_and_the_bad_reader_that_they_are_wrong() -> None:
    readers = UniSD(column="way", pick="random").readers
    contexts = [readers[f"context_{number}"].briefing for number in range(3)]
    assert [x.draw for x in contexts if isinstance(x, WithDemonstrations)] == [0, 1, 2]
    bad = readers["bad"].briefing
    assert isinstance(bad, WithDemonstrations) and not bad.good and bad.solution == "way"
    assert UniSD(wrong_column="slip").readers["bad"].briefing == WithColumn(column="slip")
    assert readers["teacher"].follow == Ema(decay=0.98, every=10)
    with pytest.raises(ConfigError, match="Name two or more"):
        UniSD(contexts=1)


def test_sdft_tells_one_thing_of_three() -> None:
    kinds = {
        WithColumn: SDFT(),
        WithDemonstrations: SDFT(demonstrations=3),
        WithSystem: SDFT(system="Answer in French."),
    }
    assert all(type(method.readers["teacher"].briefing) is kind for kind, method in kinds.items())
    assert SDFT(decay=1.0).readers["teacher"].follow == Frozen()
    with pytest.raises(ConfigError, match="Choose one of the two"):
        SDFT(system="Answer in French.", demonstrations=3)


def test_sdpo_told_peers_with_the_other_knobs_of_multi_rollout_is_it_but_for_whom_it_is_told() -> None:
    same: dict[str, Any] = {"beta": 0.5, "top_k": 100, "decay": 0.95}
    sdpo, several = SDPO(told="peers", **same), MultiRollout(successes=1, failures=0, **same)
    assert sdpo.objective == several.objective and sdpo.readers == several.readers
    assert SDPO().readers["teacher"].briefing == WithFeedback()
    told = MultiRollout().readers["teacher"].briefing
    assert isinstance(told, WithPeers) and (told.successes, told.failures) == (2, 1)


def test_an_importance_ratio_is_1_where_the_student_drew_the_token_itself() -> None:
    case = make_case()
    with_ratio, without = SDPO(top_k=K), SDPO(top_k=K, ratio_cap=0.0)
    torch.testing.assert_close(
        case.gradient(with_ratio.objective), case.gradient(without.objective), rtol=0, atol=1e-15
    )
    assert isinstance(with_ratio.objective.terms[0].loss, ImportanceWeighted)


def test_ptd_without_its_tutor_is_grpo_and_tutors_failures_alone() -> None:
    case = make_case()
    grpo = Objective(Term("grpo", STUDENT, PolicyGradient(GroupAdvantage(divide=True), clip=0.2), over="sequences"))
    assert torch.equal(case.gradient(PTD(weight=0.0, top_k=K).objective), case.gradient(grpo))
    weights = PTD(top_k=K).objective.plan(case.tokens).weights["tutor"]
    failed_N = case.tokens.rewards_S[case.tokens.sequences_N] <= 0
    assert bool(weights[failed_N].any()) and not weights[~failed_N].any()
    valid = PTD(top_k=K, shorter_than=6).objective.plan(case.tokens).weights["tutor"]
    short_N = case.tokens.num_actions_S[case.tokens.sequences_N] < 6
    assert not valid[~short_N].any() and bool(valid.any())


def test_the_gate_of_cgtr_is_its_teachers() -> None:
    gate = Gated(min_steps=7)
    assert CGTR(gate=gate).readers["teacher"].follow == gate and CGTR().readers["teacher"].follow == Gated()


def test_oprd_reads_no_probability_unless_a_reward_stands_beside_it() -> None:
    assert OPRD().needs == Needs.HIDDEN | Needs.STUDENT_HIDDEN
    assert Needs.SAMPLED in OPRD(log_ratio=0.5).needs


@pytest.mark.parametrize("name", [name for name, cls in METHODS.items() if cls().readers])
def test_every_reader_that_a_method_reads_beside_the_teacher_is_one_that_it_prescribes(name: str) -> None:
    method: Method = METHODS[name]()
    assert set(method.objective.readers) - {READER} <= set(method.readers)


def test_opsd_tells_the_column_that_it_is_given() -> None:
    assert OPSD(column="way").readers["teacher"].briefing == WithColumn(column="way")
