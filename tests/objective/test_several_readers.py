"""Several readers in another training loop, with responses unread, and in plans that are made piece by piece."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch

from tests.objective.cases import F64, Case, make_case
from tropd.briefings.mixtures import Mean, Steered
from tropd.errors import EvidenceError
from tropd.objective import Objective, ReaderEvidence, Term, Tokens, distillation_loss
from tropd.objective.context import Context
from tropd.objective.losses import ForwardKL, JensenShannon, ReverseKL, SampledReverseKL
from tropd.objective.selectors import STUDENT, Everywhere, TeacherEntropyAbove
from tropd.objective.terms import Over

SEVERAL = Objective(
    Term("pull", STUDENT & TeacherEntropyAbove(0.3, reader="a"), SampledReverseKL()),
    Term("guide", STUDENT, ForwardKL(support="teacher_top_k", top_k=3, reader="a"), weight=0.5),
    Term("also", STUDENT, ReverseKL(support="teacher_top_k", top_k=4, reader="b")),
    Term("own", STUDENT, ReverseKL(support="student_top_k", top_k=2, reader="a")),
    Term("whole", Everywhere(), JensenShannon(reader="b"), over="sequences"),
)


def others(case: Case) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(8)
    shape = case.teacher.shape
    return {name: (1.5 * torch.randn(shape, generator=g, dtype=F64)).log_softmax(-1) for name in ("a", "b")}


def given(case: Case, **changes: Any) -> dict[str, Any]:
    """The case as another training loop has it."""
    tokens = case.tokens
    values = {
        "token_ids": tokens.token_ids_N,
        "authors": tokens.authors_N,
        "sequences": tokens.sequences_N,
        "logits": case.logits,
        "teacher_logits": case.teacher,
        "readers": {name: ReaderEvidence(logits=x) for name, x in others(case).items()},
    }
    return {**values, **changes}


def by_hand(case: Case, term: str) -> torch.Tensor:
    """The loss of one of the terms above, from the definition."""
    log_s, q, tokens = case.logits.log_softmax(-1), others(case), case.tokens
    student = (tokens.authors_N == 1).to(F64)
    actions = float(((tokens.authors_N == 1) | (tokens.authors_N == 2)).sum())
    if term == "guide":
        top = q["a"].topk(3)
        gap_N = (top.values.exp() * (top.values - log_s.gather(1, top.indices))).sum(-1)
        return 0.5 * (student * gap_N).sum() / actions
    mean = ((log_s.exp() + q["b"].exp()) / 2).log()
    each = 0.5 * (q["b"].exp() * (q["b"] - mean)).sum(-1) + 0.5 * (log_s.exp() * (log_s - mean)).sum(-1)
    acts = (tokens.authors_N == 1) | (tokens.authors_N == 2)
    rows = [each[acts & (tokens.sequences_N == s)] for s in range(int(tokens.sequences_N.max()) + 1)]
    return torch.stack([row.mean() for row in rows if len(row)]).mean()


@pytest.mark.parametrize("term", ["guide", "whole"])
def test_another_loop_gets_the_loss_and_the_gradient_of_every_reader(term: str) -> None:
    case = make_case()
    one = Objective(next(t for t in SEVERAL.terms if t.name == term))
    readers = {name: x for name, x in given(case)["readers"].items() if name in one.readers}
    found, expected = distillation_loss(one, **given(case, readers=readers)).loss, by_hand(case, term)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, case.logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_pieces_of_evidence_are_as_good_as_the_whole_distribution() -> None:
    case = make_case()
    objective = Objective(*(term for term in SEVERAL.terms if term.name in ("pull", "guide")))
    full = others(case)["a"]
    top = full.topk(3)
    parts = ReaderEvidence(
        logprobs=full.gather(1, case.tokens.token_ids_N[:, None])[:, 0],
        top_k=(top.indices, top.values),
        entropy=torch.special.entr(full.exp()).sum(-1),
    )
    whole = distillation_loss(objective, **given(case, readers={"a": ReaderEvidence(logits=full)}))
    assert torch.equal(distillation_loss(objective, **given(case, readers={"a": parts})).loss, whole.loss)
    log_s = case.logits.log_softmax(-1)
    own = {"logits": None, "logprobs": log_s.gather(1, case.tokens.token_ids_N[:, None])[:, 0]}
    at = ReaderEvidence(top_k=parts.top_k, top_k_logprobs=log_s.gather(1, top.indices), entropy=parts.entropy)
    alone = distillation_loss(objective, **given(case, readers={"a": at}, **own))
    torch.testing.assert_close(alone.loss, whole.loss)


def test_a_combined_reader_is_given_as_what_its_parts_make() -> None:
    case, q = make_case(), others(make_case())
    q["teacher"] = case.teacher
    for mixture in (Mean(of=("a", "b")), Steered(plus=("a",), minus=("b",), strength=0.4)):
        objective = Objective(Term("pull", STUDENT, ReverseKL(reader="mixed")))
        mixed = ReaderEvidence(logits=mixture(q))
        found = distillation_loss(objective, **given(case, readers={"mixed": mixed})).loss
        teacher = Objective(Term("pull", STUDENT, ReverseKL()))
        again = distillation_loss(teacher, **given(case, teacher_logits=mixture(q), readers=None)).loss
        assert torch.equal(found, again)


@pytest.mark.parametrize("over", get_args(Over))
def test_the_loss_with_unread_responses_is_that_without_them(over: Over) -> None:
    """For evidence of another reader, whatever the term's sum is divided by."""
    case = make_case()
    read = torch.tensor([True, False, True, True, False, True])
    objective = Objective(Term("guide", Everywhere(), ForwardKL(support="full", reader="a"), over=over))
    kept = read[case.tokens.sequences_N]
    full = others(case)["a"]
    evidence = ReaderEvidence(logits=full.masked_fill(~kept[:, None], 0.0), read=read)
    whole = distillation_loss(objective, **given(case, readers={"a": evidence}))
    part = given(case, readers={"a": ReaderEvidence(logits=full[kept])})
    new_of = read.cumsum(0) - 1
    rows = ("token_ids", "authors", "logits", "teacher_logits")
    part |= {name: part[name][kept] for name in rows} | {"sequences": new_of[case.tokens.sequences_N[kept]]}
    torch.testing.assert_close(whole.loss, distillation_loss(objective, **part).loss, rtol=1e-12, atol=0)


def told(case: Case) -> Tokens:
    """The tokens with what two others say."""
    tokens = case.tokens
    for name, full in others(case).items():
        said = full.gather(1, tokens.token_ids_N[:, None])[:, 0]
        entropy = torch.special.entr(full.exp()).sum(-1)
        top = full.topk(4)
        tokens = tokens.told(name, teacher_logprobs_N=said, teacher_entropy_N=entropy, teacher_full_logprobs_NV=full)
        tokens = tokens.told(name, teacher_topk_ids_NK=top.indices, teacher_topk_logprobs_NK=top.values)
    return tokens.told("b", read_S=torch.tensor([True, True, False, True, True, True]))


def test_a_plan_made_piece_by_piece_is_the_whole_plan() -> None:
    """With the counts of the batch, whoever reads, and where one of them read nothing."""
    case = make_case()
    tokens = told(case)
    terms = (*SEVERAL.terms[:3], Term("sure", TeacherEntropyAbove(0.5, reader="b"), SampledReverseKL(reader="a")))
    objective = Objective(*terms)
    whole = objective.plan(tokens, Context(progress=0.4))
    for cut in ([4, 9, 17], list(range(1, len(tokens)))):
        edges = [0, *cut, len(tokens)]
        slices = [slice(a, b) for a, b in pairwise(edges)]
        plans = [objective.plan(tokens.rows(rows), Context(progress=0.4), whole.counts) for rows in slices]
        for term in terms:
            assert torch.equal(torch.cat([plan.weights[term.name] for plan in plans]), whole.weights[term.name])
    assert whole.weights["also"][tokens.sequences_N == 2].abs().sum() == 0
    assert whole.weights["guide"][tokens.sequences_N == 2].abs().sum() > 0


@pytest.mark.parametrize(
    ("readers", "said"),
    [
        ({}, "reads what reader 'a' says, which was not given. Give readers = {'a': ReaderEvidence"),
        ({"a": 0, "b": 0, "teacher": 0}, "'teacher', which is said by the teacher_* arguments"),
        ({"a": 0, "b": 0, "c": 0}, "'c', which is read by no part of the method"),
        ({"a": 0, "b": 1}, "`logits of reader 'b'` has 9 columns"),
        ({"a": 0, "b": 2}, "`top_k of reader 'b' ids` has shape"),
        ({"a": 0, "b": 3}, "not supplied by reader 'b'"),
    ],
)
def test_readers_that_do_not_fit_are_refused_by_name(readers: Any, said: str) -> None:
    case = make_case()
    whole = others(case)["a"]
    kinds = [
        ReaderEvidence(logits=whole),
        ReaderEvidence(logits=whole[:, :9]),
        ReaderEvidence(top_k=(whole.topk(4).indices[:-1], whole.topk(4).values[:-1])),
        ReaderEvidence(),
    ]
    with pytest.raises(EvidenceError) as refusal:
        distillation_loss(SEVERAL, **given(case, readers={name: kinds[kind] for name, kind in readers.items()}))
    assert said in str(refusal.value)
