"""Evidence that cannot be right ends in one clear error; evidence that is merely extreme in a finite, right answer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.objective.cases import ALL, F64, K, V, borrowable, describe, make_case
from tests.objective.variants import VARIANTS
from tropd.errors import EvidenceError, TrainingDiverged
from tropd.methods import (
    AOPD,
    METHODS,
    OPD,
    FullFKL,
    TrOPD,
)
from tropd.objective import (
    Context,
    ForwardKL,
    Objective,
    ReverseKL,
    Term,
    distillation_loss,
)
from tropd.objective.evidence import Needs, StudentView, Tokens
from tropd.objective.selectors import STUDENT, TrustRegion
from tropd.types import Author

_FIELDS = {
    "teacher_logprobs_N": Needs.SAMPLED,
    "teacher_topk_ids_NK": Needs.TOPK,
    "teacher_topk_logprobs_NK": Needs.TOPK,
    "student_topk_ids_NJ": Needs.STUDENT_TOPK,
    "teacher_at_student_topk_NJ": Needs.STUDENT_TOPK,
    "student_topk_logprobs_NJ": Needs.STUDENT_TOPK,
    "student_at_topk_NK": Needs.STUDENT_AT_TOPK,
    "teacher_lookahead_NJ": Needs.LOOKAHEAD,
    "teacher_full_logprobs_NV": Needs.FULL,
    "teacher_hidden_NH": Needs.HIDDEN,
    "teacher_entropy_N": Needs.TEACHER_ENTROPY,
    "teacher_chunks_N": Needs.CHUNKS,
    "teacher_support_N": Needs.CHUNKS,
    "student_entropy_N": Needs.STUDENT_ENTROPY,
    "reverse_kl_N": Needs.REVERSE_KL,
    "rewards_S": Needs.REWARD,
}
_VIEW = {
    "topk_logprobs_NK": Needs.TOPK,
    "student_topk_logprobs_NJ": Needs.STUDENT_TOPK,
    "full_logprobs_NV": Needs.FULL,
    "hidden_NH": Needs.STUDENT_HIDDEN,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_method_reads_nothing_that_it_did_not_declare(name):
    """All undeclared evidence is taken away: whoever reads it anyway is told so by name."""
    case, objective = make_case(), VARIANTS[name].objective
    tokens = case.tokens.with_(**{f: None for f, need in _FIELDS.items() if need not in objective.needs})
    view = case.view().with_(**{f: None for f, need in _VIEW.items() if need not in objective.needs})
    loss = objective(tokens, view, objective.plan(tokens, Context(progress=0.6))).loss
    assert bool(torch.isfinite(loss))


@pytest.mark.parametrize("name", [n for n in METHODS if n not in ("seqkd", "sft")])
def test_a_method_uses_everything_that_it_declares(name):
    """Taking away any declared evidence is an error that names the evidence."""
    case, objective = make_case(), VARIANTS[name].objective
    for need in objective.needs:
        gone = {f: None for f, n in _FIELDS.items() if n == need}
        tokens = case.tokens.with_(**gone)
        for reader in case.tokens.others:
            tokens = tokens.told(reader, **{f: None for f in gone if f in Tokens.of_reader})
        view = case.view().with_(**{f: None for f, n in _VIEW.items() if n == need == Needs.STUDENT_HIDDEN})
        with pytest.raises(EvidenceError, match=need.name):
            for progress in (0.1, 0.9):
                objective(tokens, view, objective.plan(tokens, Context(progress=progress)))


def test_reading_undeclared_evidence_is_an_error_that_names_it():
    class Sneaky(TrustRegion):
        own_needs = Needs.NOTHING

    case = make_case()
    objective = Objective(Term("sneaky", STUDENT & Sneaky("soft"), ForwardKL(support="teacher_top_k", top_k=K)))
    assert Needs.SAMPLED not in objective.needs
    with pytest.raises(EvidenceError, match=r"'sneaky'.*teacher_logprobs_N.*Needs\.SAMPLED"):
        objective.plan(case.tokens.with_(teacher_logprobs_N=None))


@pytest.mark.parametrize("field", ["teacher_logprobs_N", "teacher_topk_logprobs_NK", "behavior_logprobs_N"])
def test_nan_evidence_is_refused_by_name(field):
    case = make_case()
    bad = getattr(case.tokens, field).clone()
    bad[3] = float("nan")
    with pytest.raises(EvidenceError, match=f"{field}.*NaN"):
        TrOPD(top_k=K).objective.plan(case.tokens.with_(**{field: bad}))


def test_logits_given_as_logprobs_are_refused():
    case = make_case()
    with pytest.raises(EvidenceError, match="never above 0"):
        OPD().objective.plan(case.tokens.with_(teacher_logprobs_N=case.tokens.teacher_logprobs_N + 9))


def impossible(case):
    """The teacher gives the token at row 6, which the student wrote, no probability at all."""
    bad = case.tokens.teacher_logprobs_N.clone()
    bad[6] = -torch.inf
    return dataclasses.replace(case, tokens=case.tokens.with_(teacher_logprobs_N=bad))


def test_an_impossible_token_is_an_error_for_an_unbounded_reward():
    with pytest.raises(EvidenceError, match=r"term 'reverse_kl'.*not finite at 1 of .*tropd"):
        OPD().objective.plan(impossible(make_case()).tokens)


@pytest.mark.parametrize(
    "method",
    [TrOPD(top_k=K, trust=t, outlier=o) for t in ("bernoulli", "threshold", "soft") for o in ("forward_kl", "mask")]
    + [AOPD(top_k=K), VARIANTS["clip_outlier"], VARIANTS["mask_outlier"], VARIANTS["topd"], VARIANTS["opd_plus"]],
)
def test_an_impossible_token_is_finite_for_a_bounded_method(method):
    gradient = impossible(make_case()).gradient(method.objective)
    assert bool(torch.isfinite(gradient).all())


def test_a_student_that_gives_no_probability_is_an_error_that_names_the_term():
    case = make_case()
    view = case.view()
    logprobs = view.logprobs_N.detach().clone()
    logprobs[6] = -torch.inf
    objective = OPD().objective
    with pytest.raises(TrainingDiverged, match="term 'reverse_kl' is not finite on"):
        tokens = case.tokens.with_(behavior_logprobs_N=torch.full_like(logprobs, -torch.inf))
        objective(tokens, view.with_(logprobs_N=logprobs), objective.plan(case.tokens))


def test_zero_teacher_probabilities_are_right_in_forward_and_infinite_in_reverse_kl():
    case = make_case()
    teacher = case.tokens.teacher_full_logprobs_NV.clone()
    teacher[:, 0] = -torch.inf
    teacher = teacher.log_softmax(-1)
    tokens = case.tokens.with_(teacher_full_logprobs_NV=teacher)
    value = ForwardKL()(tokens, case.view(), None)
    gradient = torch.autograd.grad(value.sum(), case.logits)[0]
    torch.testing.assert_close(gradient, case.logits.softmax(-1).detach() - teacher.exp())
    with pytest.raises(TrainingDiverged, match="term 'kl'"):
        objective = Objective(Term("kl", STUDENT, ReverseKL()))
        objective(tokens, case.view(), objective.plan(tokens))


def test_more_top_k_than_the_teacher_gave_is_an_error_that_names_the_term_and_the_remedy():
    case = make_case()
    objective = TrOPD(top_k=8, trust="soft").objective
    with pytest.raises(EvidenceError, match=r"term 'outlier'.*top-8.*only 4.*max-logprobs 8"):
        objective(case.tokens, case.view(), objective.plan(case.tokens))


def test_top_k_beyond_the_vocabulary_takes_the_whole_vocabulary():
    case = make_case(top_k=V)
    big, exact = (case.gradient(FullFKL(top_k=k).objective) for k in (64, V))
    torch.testing.assert_close(big, exact, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(bad):
    case = make_case()
    ids = case.tokens.token_ids_N.clone()
    ids[0] = bad
    with pytest.raises(EvidenceError, match="token_ids_N.*vocabulary is 0..10"):
        OPD().objective.plan(case.tokens.with_(token_ids_N=ids))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("authors", [Author.CONTEXT, Author.TEACHER])
def test_no_token_to_train_on_gives_a_zero_loss_that_backward_can_run_on(name, authors):
    case = make_case()
    nobody = torch.full_like(case.tokens.authors_N, int(authors))
    tokens = describe(case.logits, case.teacher, case.tokens.token_ids_N, nobody, case.tokens.sequences_N)
    objective = VARIANTS[name].objective
    output = objective(tokens, case.view(), objective.plan(tokens))
    (gradient,) = torch.autograd.grad(output.loss, case.logits)
    assert bool(torch.isfinite(gradient).all())
    if authors == Author.CONTEXT:
        assert float(output.loss.detach()) == 0 and float(gradient.abs().max()) == 0


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_micro_batch_can_be_run(name):
    case, objective = make_case(), VARIANTS[name].objective
    rows = slice(0, 0)
    plan = objective.plan(case.tokens).rows(rows)
    assert float(objective(case.tokens.rows(rows), case.view(rows), plan).loss.detach()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in METHODS if borrowable(VARIANTS[name])])
def test_every_dtype_gives_a_finite_gradient_close_to_float64(name, dtype):
    """Soft trust, so that rounding cannot flip a draw."""
    method = TrOPD(top_k=K, trust="soft") if name == "tropd" else VARIANTS[name]
    method = METHODS["reopold"](stages=1) if name == "reopold" else method
    g = torch.Generator().manual_seed(2)
    logits, teacher = (torch.randn(4, 6, V, generator=g).to(dtype) for _ in range(2))
    ids, authors = torch.randint(V, (4, 6), generator=g), torch.tensor([[0, 2, 1, 1, 1, 1]]).expand(4, 6)

    def gradient(kind):
        leaf = logits.to(kind).requires_grad_()
        output = distillation_loss(
            method,
            token_ids=ids,
            authors=authors,
            logits=leaf,
            teacher_logits=teacher.to(kind),
            rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]),
            groups=torch.tensor([0, 0, 1, 1]),
        )
        assert output.loss.dtype == torch.promote_types(kind, torch.float32)
        return torch.autograd.grad(output.loss, leaf)[0].double()

    exact = gradient(F64)
    coarse = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 1e-5, F64: 0.0}[dtype]
    assert float((gradient(dtype) - exact).norm()) <= coarse * float(exact.norm()) + 1e-12


def test_evidence_of_another_shape_is_refused():
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(EvidenceError, match=r"`teacher_logprobs` has shape \(3, 2\), but token_ids has \(2, 3\)"):
        distillation_loss(
            OPD(),
            token_ids=ids,
            authors=ids + 1,
            logits=torch.zeros(2, 3, V),
            teacher_logprobs=torch.full((3, 2), -1.0),
        )


def test_batch_wide_methods_cannot_be_planned_one_micro_batch_at_a_time():
    counts = OPD().objective.plan(make_case().tokens).counts
    ids = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(EvidenceError, match="whole batch"):
        distillation_loss(
            VARIANTS["entropy_opd"], token_ids=ids, authors=ids + 1, logits=torch.zeros(2, 3, V), counts=counts
        )


def test_all_needs_are_known_to_this_file():
    declared = set(_FIELDS.values()) | set(_VIEW.values())
    assert {need for need in ALL} == declared
    of_itself = {"behavior_logprobs_N", "student_logprobs_N", "groups_S", "vocab_size", "num_before_N", "num_after_N"}
    of_itself |= {"columns", "read_S", "read_N", "num_read_S"}
    assert set(_FIELDS) == {f.name for f in dataclasses.fields(Tokens) if f.default is None} - of_itself
    own = {"logprobs_N", "columns", "reader", "others"}
    assert set(_VIEW) == {f.name for f in dataclasses.fields(StudentView)} - own
