"""How a batch is cut, ordered, padded or spread over ranks changes no gradient, for any method and option."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch

from tests.objective.cases import Case, K, close, describe, make_case
from tests.objective.ranks import on_ranks
from tests.objective.variants import VARIANTS
from tropd.methods import (
    EOPD,
    METHODS,
    OPD,
    TrOPD,
)
from tropd.objective import (
    Context,
    Reach,
)
from tropd.objective.borrow import distillation_loss
from tropd.types import Author

warnings.simplefilter("ignore")


CONTEXT = Context(progress=0.3)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def whole(case: Case, objective) -> torch.Tensor:
    return case.gradient(objective, CONTEXT.progress)


@pytest.mark.parametrize("name", VARIANTS)
def test_any_cut_into_micro_batches_adds_up(case, name):
    objective = VARIANTS[name].objective
    plan = objective.plan(case.tokens, CONTEXT)
    for cuts in ([0, 1, 9, 26], [0, 13, 26], list(range(27))):
        loss = 0.0
        for low, high in itertools.pairwise(cuts):
            rows = slice(low, high)
            loss = loss + objective(case.tokens.rows(rows), case.view(rows), plan.rows(rows)).loss
        close(torch.autograd.grad(loss, case.logits)[0], whole(case, objective), 1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_any_order_of_rows_gives_the_same_gradient(case, name):
    objective = VARIANTS[name].objective
    order = torch.randperm(len(case.tokens), generator=torch.Generator().manual_seed(1))
    tokens = case.tokens.rows(order)
    loss = objective(tokens, case.view(order), objective.plan(tokens, CONTEXT)).loss
    close(torch.autograd.grad(loss, case.logits)[0], whole(case, objective), 1e-12)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("split", [[[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [1, 2, 4]]])
def test_any_number_of_ranks_gives_the_same_gradient(case, name, split):
    objective = VARIANTS[name].objective

    def planned(tokens, world):
        return tokens, objective.plan(tokens, Context(progress=0.3, world=world))

    loss = sum(
        objective(tokens, case.view(rows), plan).loss for rows, (tokens, plan) in on_ranks(case.tokens, split, planned)
    )
    close(torch.autograd.grad(loss, case.logits)[0], whole(case, objective), 1e-12)


@pytest.mark.parametrize("name", [n for n, m in VARIANTS.items() if m.objective.reach == Reach.TOKEN])
def test_token_reach_can_be_planned_piece_by_piece(case, name):
    """With global counts, planning each piece on its own gives the same: what a fused head does tile by tile."""
    objective = VARIANTS[name].objective
    counts = objective.plan(case.tokens, CONTEXT).counts
    loss = 0.0
    for low in range(0, 26, 7):
        rows = slice(low, min(low + 7, 26))
        tokens = case.tokens.rows(rows)
        loss = loss + objective(tokens, case.view(rows), objective.plan(tokens, CONTEXT, counts)).loss
    close(torch.autograd.grad(loss, case.logits)[0], whole(case, objective), 1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_context_and_environment_get_no_gradient(case, name):
    gradient = whole(case, VARIANTS[name].objective)
    silent = (case.tokens.authors_N != Author.STUDENT) & (case.tokens.authors_N != Author.TEACHER)
    assert float(gradient[silent].abs().max()) == 0
    assert bool(torch.isfinite(gradient).all())
    assert float(gradient.abs().sum()) > 0


def at_the_teacher(case: Case) -> Case:
    """The same tokens, all the student's, under a student that is its teacher to the last bit."""
    logits = case.teacher.clone().requires_grad_()
    teacher = logits.detach().log_softmax(-1)
    authors = torch.full_like(case.tokens.authors_N, int(Author.STUDENT))
    return Case(logits, teacher, describe(logits, teacher, case.tokens.token_ids_N, authors, case.tokens.sequences_N))


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.zero_at_teacher])
def test_a_student_that_equals_its_teacher_gets_no_signal(case, name):
    assert float(whole(at_the_teacher(case), VARIANTS[name].objective).abs().max()) < 1e-16


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if not m.zero_at_teacher and n not in ("seqkd", "sft")])
def test_methods_that_do_not_promise_zero_at_the_teacher_are_right_not_to(case, name):
    method = EOPD(threshold=0.1, top_k=K) if name == "eopd" else VARIANTS[name]
    assert float(whole(at_the_teacher(case), method.objective).abs().max()) > 1e-6


def test_padding_changes_nothing():
    """[B, T] with garbage in the padding equals the flat rows."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 6, 11, generator=g, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 6, 11, generator=g, dtype=torch.float64)
    ids = torch.randint(11, (3, 6), generator=g)
    authors = torch.tensor([[0, 0, 2, 1, 1, 1], [0, 1, 1, -1, -1, -1], [0, 0, 0, 1, 1, -1]])
    for name in ("tropd", "opd_discounted", "entropy_opd", "aopd", "topd_group"):
        shared = dict(seed=3, progress=0.3, rewards=torch.ones(3), groups=torch.tensor([0, 0, 1]))
        padded = distillation_loss(
            VARIANTS[name], token_ids=ids, authors=authors, logits=logits, teacher_logits=teacher, **shared
        ).loss
        keep = authors >= 0
        flat = distillation_loss(
            VARIANTS[name],
            token_ids=ids[keep],
            authors=authors[keep],
            logits=logits[keep],
            teacher_logits=teacher[keep],
            sequences=torch.arange(3)[:, None].expand(3, 6)[keep],
            **shared,
        ).loss
        a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (padded, flat))
        close(a, b, 1e-14)
        assert float(a[~keep].abs().max()) == 0


def test_a_draw_belongs_to_its_token_whatever_the_batch():
    case = make_case()
    objective = TrOPD(top_k=K).objective
    all_rows = objective.plan(case.tokens).weights["trusted"] > 0
    for sequence in range(6):
        rows = (case.tokens.sequences_N == sequence).nonzero().flatten()
        alone = objective.plan(case.tokens.rows(rows)).weights["trusted"] > 0
        assert torch.equal(alone, all_rows[rows])


def test_a_mean_of_micro_batch_means_is_another_objective():
    """The defect that global denominators avoid: tokens of short micro-batches would weigh more."""
    case, objective = make_case(), OPD().objective
    naive = 0.0
    for rows in (slice(0, 6), slice(6, 26)):
        tokens = case.tokens.rows(rows)
        naive = naive + objective(tokens, case.view(rows), objective.plan(tokens, CONTEXT)).loss / 2
    gradient = torch.autograd.grad(naive, case.logits)[0]
    assert float(torch.cosine_similarity(gradient.flatten(), whole(case, objective).flatten(), 0)) < 0.98
