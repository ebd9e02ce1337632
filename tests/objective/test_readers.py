"""Several readers of the same responses: whose evidence a piece sees, and what is done where one did not read."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch

from tests.objective.cases import F64, make_case
from tests.objective.variants import VARIANTS
from tropd.errors import EvidenceError
from tropd.objective import Objective, StudentView, Term, Tokens
from tropd.objective.context import Context
from tropd.objective.evidence import READER, Needs
from tropd.objective.losses import ForwardKL, PolicyGradient, SampledReverseKL
from tropd.objective.rewards import Clip, LogRatio, chain
from tropd.objective.selectors import STUDENT, Everywhere, TeacherEntropyAbove
from tropd.objective.terms import Over

OTHER = "other"


def told(case: Any, reader: str) -> tuple[Tokens, StudentView]:
    """The case with its teacher's evidence under another name, and nonsense under the teacher's."""
    names = [name for name in Tokens.of_reader if case.tokens.peek(name) is not None]
    theirs = {name: case.tokens.peek(name) for name in names}
    nonsense = {name: x.flip(0) for name, x in theirs.items() if isinstance(x, torch.Tensor)}
    nonsense["columns"] = {name: x.flip(0) for name, x in theirs["columns"].items()}
    view = case.view()
    at_theirs = view.peek("topk_logprobs_NK")
    view = view.with_(topk_logprobs_NK=at_theirs.detach().flip(0)).told(reader, topk_logprobs_NK=at_theirs)
    return case.tokens.with_(**nonsense).told(reader, **theirs), view


def read_by(objective: Objective, reader: str | None) -> Objective:
    def other(term: Term) -> Term:
        parts = {name: dataclasses.replace(getattr(term, name), reader=reader) for name in ("where", "loss")}
        return dataclasses.replace(term, **parts)

    return Objective(*map(other, objective.terms))


@pytest.mark.parametrize("name", VARIANTS)
def test_every_method_can_read_another_reader_than_the_teacher(name: str) -> None:
    """Nothing of the teacher's own evidence is left in the loss, whichever pieces a method is made of."""
    case, objective = make_case(), read_by(VARIANTS[name].objective, None)
    other = read_by(objective, OTHER)
    assert other.readers == tuple(sorted(OTHER if name == READER else name for name in objective.readers))
    assert other.needs == objective.needs
    assert other.top_k_of(OTHER) == objective.teacher_top_k and other.needs_of(OTHER) == objective.needs_of(READER)
    tokens, view = told(case, OTHER)
    context = Context(progress=0.3)
    found = other(tokens, view, other.plan(tokens, context)).loss
    expected = objective(case.tokens, case.view(), objective.plan(case.tokens, context)).loss
    assert torch.equal(found, expected)
    gradient = torch.autograd.grad(found, case.logits)[0]
    assert torch.equal(gradient, case.gradient(objective))


def test_a_part_with_a_reader_of_its_own_keeps_it_inside_a_piece_of_another() -> None:
    case = make_case()
    tokens, _ = told(case, OTHER)
    reward = chain(LogRatio(), LogRatio(reader=READER), Clip(high=9.0), reader=OTHER)
    found_N = reward(torch.zeros(len(tokens), dtype=F64), tokens, Context())
    torch.testing.assert_close(found_N, (tokens.of(OTHER).log_ratio_N + tokens.log_ratio_N).clamp(max=9.0))
    assert reward.asks() == {OTHER: Needs.SAMPLED, READER: Needs.SAMPLED}


def test_a_log_ratio_compares_any_two() -> None:
    case = make_case()
    tokens, _ = told(case, OTHER)
    zero_N = torch.zeros(len(tokens), dtype=F64)
    there_N = LogRatio(against=OTHER)(zero_N, tokens, Context())
    back_N = LogRatio(reader=OTHER, against=READER)(zero_N, tokens, Context())
    assert there_N.abs().max() > 1 and torch.equal(there_N, -back_N)
    assert Objective(Term("t", STUDENT, PolicyGradient(LogRatio(against=OTHER)))).readers == (OTHER, READER)


def test_each_reader_is_asked_only_for_what_somebody_reads_of_it() -> None:
    objective = Objective(
        Term("guide", STUDENT, ForwardKL(support="teacher_top_k", top_k=3, reader="a")),
        Term("pull", STUDENT & TeacherEntropyAbove(0.5, reader="b"), SampledReverseKL()),
    )
    assert objective.asks == {"a": Needs.TOPK, "b": Needs.TEACHER_ENTROPY, READER: Needs.SAMPLED}
    assert [objective.top_k_of(name) for name in ("a", "b", READER)] == [3, 0, 0]


def test_a_reader_that_nobody_asked_is_named() -> None:
    case = make_case()
    objective = Objective(Term("pull", STUDENT, SampledReverseKL(reader="elder")))
    with pytest.raises(EvidenceError, match="`teacher_logprobs_N` was read, but it was not supplied by reader 'elder'"):
        objective(case.tokens, case.view(), objective.plan(case.tokens))


@pytest.mark.parametrize("over", get_args(Over))
def test_a_response_that_its_reader_did_not_read_is_as_if_it_were_not_there(over: Over) -> None:
    """Loss and gradient are those of the batch without it: no weight, and no place in a denominator."""
    case = make_case()
    read_S = torch.tensor([True, False, True, True, False, True])
    term = Term("guide", Everywhere(), ForwardKL(support="full"), over=over)
    other = Term("pull", STUDENT, SampledReverseKL(reader=OTHER))
    objective = Objective(term, other)
    tokens = case.tokens.told(OTHER, teacher_logprobs_N=case.tokens.teacher_logprobs_N).with_(read_S=read_S)
    whole = objective(tokens, case.view(), objective.plan(tokens))

    rows = read_S[case.tokens.sequences_N]
    kept = case.tokens.rows(rows)
    new_of = read_S.cumsum(0) - 1
    per_sequence = {name: kept.peek(name)[read_S] for name in ("keys_S", "num_actions_S", "rewards_S", "groups_S")}
    kept = kept.with_(sequences_N=new_of[kept.sequences_N], **per_sequence)
    alone = Objective(term)
    part = alone(kept, case.view(rows), alone.plan(kept))
    torch.testing.assert_close(whole.terms["guide"].loss, part.terms["guide"].loss, rtol=1e-12, atol=0)
    alone = Objective(other)
    untouched = alone(tokens, case.view(), alone.plan(tokens))
    assert whole.terms["pull"] == untouched.terms["pull"], "the other term has its whole batch"


def test_what_was_filled_in_for_an_unread_response_is_never_looked_at() -> None:
    case = make_case()
    read_S = torch.tensor([True, False, True, True, False, True])
    unread_N = ~read_S[case.tokens.sequences_N]
    objective = Objective(Term("guide", TeacherEntropyAbove(0.2), ForwardKL(support="full")))

    def loss(filled: float) -> torch.Tensor:
        full = case.tokens.teacher_full_logprobs_NV.masked_fill(unread_N[:, None], filled)
        entropy = case.tokens.teacher_entropy_N.masked_fill(unread_N, -filled if filled > -1e3 else 0.0)
        tokens = case.tokens.with_(read_S=read_S, teacher_full_logprobs_NV=full, teacher_entropy_N=entropy)
        return objective(tokens, case.view(), objective.plan(tokens)).loss

    assert torch.equal(loss(0.0), loss(-1e4)) and torch.equal(loss(0.0), loss(-2.0))


def test_columns_go_by_name_and_reader() -> None:
    case = make_case()
    column_N = torch.arange(len(case.tokens), dtype=F64)
    tokens = case.tokens.told(OTHER, columns={"margin": column_N})
    assert torch.equal(tokens.rows(slice(2, 5)).of(OTHER).column("margin"), column_N[2:5])
    with pytest.raises(EvidenceError, match="column 'margin' of reader 'teacher'"):
        tokens.column("margin")
