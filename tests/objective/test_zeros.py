"""Tokens that one model, the other or both give no probability at all: finite where the mathematics is, else an error.

Every pattern of zeros over a small vocabulary is tried; the reference is the sum over the tokens that count.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.objective.cases import F64, K, V, borrowable, close, make_case
from tests.objective.variants import VARIANTS
from tropd.errors import EvidenceError, TrainingDiverged
from tropd.methods import METHODS, TIP, ManyFaces, Rethinking
from tropd.objective import ForwardKL, JensenShannon, ReverseKL, Tokens, distillation_loss
from tropd.objective.context import Context
from tropd.objective.measures import Measure, Normalised, ReverseKLAt
from tropd.objective.rewards import DivergenceWeight, FutureSum
from tropd.objective.selectors import PerplexityWeight, TopFraction
from tropd.objective.support import expected_gap, log_mixture
from tropd.objective.targets import GeometricBridge, Temperature
from tropd.objective.terms import Selector
from tropd.types import Author

ZERO = -torch.inf
PATTERNS = [p for p in itertools.product((0, 1, 2, 3), repeat=3) if 3 in p]
"""Of three tokens, which the teacher (bit 1) and the student (bit 2) can write; both can write at least one."""


def term(p: float, q: float) -> float:
    """p log(p / q) with 0 log 0 = 0."""
    return 0.0 if p == 0 else math.inf if q == 0 else p * math.log(p / q)


def kl(p: list[float], q: list[float]) -> float:
    return sum(map(term, p, q))


def mixed(t: list[float], s: list[float], share: float) -> list[float]:
    return [share * a + (1 - share) * b for a, b in zip(t, s, strict=True)]


DIVERGENCES = {
    "forward": (ForwardKL(), lambda t, s: kl(t, s)),
    "forward_skewed": (ForwardKL(skew=0.3), lambda t, s: kl(t, mixed(t, s, 0.3))),
    "forward_generalised": (ForwardKL(outside="generalised"), lambda t, s: kl(t, s)),
    "reverse": (ReverseKL(), lambda t, s: kl(s, t)),
    "reverse_skewed": (ReverseKL(skew=0.3), lambda t, s: kl(s, mixed(s, t, 0.3))),
    "reverse_generalised": (ReverseKL(outside="generalised"), lambda t, s: kl(s, t)),
    "reverse_stop_gradient": (ReverseKL(outside="stop_gradient"), lambda t, s: kl(s, t)),
    "jensen_shannon": (
        JensenShannon(beta=0.3),
        lambda t, s: 0.3 * kl(t, mixed(t, s, 0.3)) + 0.7 * kl(s, mixed(t, s, 0.3)),
    ),
}


def two(pattern: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The student's logits, a leaf, and the teacher's log-distribution."""
    student, teacher = torch.tensor([[0.3, -0.4, 0.1]], dtype=F64), torch.tensor([[-0.2, 0.5, 0.4]], dtype=F64)
    writes = torch.tensor([pattern])
    logits = student.masked_fill(writes & 2 == 0, ZERO).requires_grad_()
    return logits, teacher.masked_fill(writes & 1 == 0, ZERO).log_softmax(-1)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_its_sum_over_the_tokens_that_count(name, pattern):
    loss, reference = DIVERGENCES[name]
    logits, teacher = two(pattern)
    log_s = logits.log_softmax(-1)
    value = loss.between(teacher, log_s)
    expected = reference(teacher.exp().tolist()[0], log_s.exp().tolist()[0])
    assert float(value.detach()) == pytest.approx(expected, abs=1e-12)
    if math.isfinite(expected):
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert bool(gradient.isfinite().all())
        assert bool((gradient[logits == ZERO] == 0).all())
        close(gradient, numerical(loss, logits.detach(), teacher, name), 1e-7)


def numerical(loss: ForwardKL | ReverseKL | JensenShannon, logits: Tensor, teacher: Tensor, name: str) -> Tensor:
    """Central differences; a loss that stops a gradient has that of the divergence it corrects."""
    loss = ReverseKL() if name == "reverse_stop_gradient" else loss
    gradient, step = torch.zeros_like(logits), 1e-6
    for v in (logits > ZERO).nonzero()[:, 1]:
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[0, v] += sign * step
            ends.append(float(loss.between(teacher, moved.log_softmax(-1))))
        gradient[0, v] = (ends[0] - ends[1]) / (2 * step)
    return gradient


def borrowed(method, student: Tensor, teacher: Tensor, ids: Tensor, authors: Tensor):
    leaf = student.clone().requires_grad_()
    output = distillation_loss(
        method,
        token_ids=ids,
        authors=authors,
        logits=leaf,
        teacher_logits=teacher,
        rewards=torch.tensor([1.0, 0.0, 1.0]),
        groups=torch.tensor([0, 0, 1]),
    )
    return output, torch.autograd.grad(output.loss, leaf)[0]


def batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(3, 5, V, generator=g, dtype=F64) for _ in range(2))
    return student, teacher, torch.randint(V - 1, (3, 5), generator=g), torch.tensor([[0, 2, 1, 1, 1]]).expand(3, 5)


def padded(x: Tensor, columns: int = 3) -> Tensor:
    return torch.cat([x, torch.full((*x.shape[:-1], columns), ZERO, dtype=x.dtype)], -1)


SUPPORTS = ("teacher_top_k", "student_top_k", "union", "intersection", "difference")
WEIGHTS = ("student", "teacher", "none")
OUTSIDES = {
    "reverse_kl": ("ignore", "stop_gradient", "generalised", "bucket", "renormalise"),
    "forward_kl": ("ignore", "generalised", "bucket", "renormalise", "renormalise_teacher"),
}
ALL = {
    **{name: method for name, method in VARIANTS.items() if borrowable(method)},
    **{f"{name} with its top_k": cls() for name, cls in METHODS.items() if borrowable(cls())},
    **{
        f"{d}, all of {s} and {o}": ManyFaces(divergence=d, support=s, outside=o, top_k=64)
        for d, outsides in OUTSIDES.items()
        for s, o in itertools.product(SUPPORTS, outsides)
    },
    **{f"gradient of {s} by {w}": Rethinking(support=s, weight=w, top_k=64) for s in SUPPORTS for w in WEIGHTS},
}
"""The defaults' top_k is larger than the vocabulary, so that padding is among the likeliest tokens."""


@pytest.mark.parametrize("name", ALL)
def test_vocabulary_that_neither_model_can_write_changes_nothing(name):
    """Heads padded with -inf on both sides: the same loss, the same gradient, and none on the padding."""
    student, teacher, ids, authors = batch()
    plain, plain_gradient = borrowed(ALL[name], student, teacher, ids, authors)
    wide, gradient = borrowed(ALL[name], padded(student), padded(teacher), ids, authors)
    close(wide.loss, plain.loss, 1e-12)
    close(gradient, padded(plain_gradient).masked_fill(padded(student) == ZERO, 0.0), 1e-12)
    assert bool(plain_gradient.any()) or "intersection" in name or "difference" in name  # which may be empty


@pytest.mark.parametrize("side", ["teacher", "student"])
@pytest.mark.parametrize("name", ALL)
def test_a_token_that_one_model_cannot_write_is_trained_on_or_an_error_but_never_dropped(name, side):
    """The token is not among the written ones, so only sums over the vocabulary see it."""
    student, teacher, ids, authors = batch()
    (teacher if side == "teacher" else student)[..., V - 1] = ZERO
    try:
        output, gradient = borrowed(ALL[name], student, teacher, ids, authors)
    except TrainingDiverged as error:  # a divergence that is infinite here
        assert "not finite" in str(error) and "-inf" in str(error)
        return
    assert bool(gradient.isfinite().all()) and math.isfinite(float(output.loss.detach()))
    shown, _ = borrowed(ALL[name], *batch()[:2], ids, authors)
    assert {n: t.tokens for n, t in output.terms.items() if t.tokens == 0} == {
        n: t.tokens for n, t in shown.terms.items() if t.tokens == 0
    }


def test_tip_chooses_the_tokens_whose_divergence_is_infinite():
    """As many tokens as without zeros, the infinite ones first; their loss is an error that says so."""
    case = make_case()
    divergence_N = case.tokens.reverse_kl_N.clone()
    divergence_N[[6, 9]] = torch.inf
    plan = TIP(fraction=0.2).objective.plan(case.tokens.with_(reverse_kl_N=divergence_N))
    plain = TIP(fraction=0.2).objective.plan(case.tokens)
    chosen = plan.weights["reverse_kl"] > 0
    assert bool(chosen[[6, 9]].all()) and int(chosen.sum()) == int((plain.weights["reverse_kl"] > 0).sum())


@pytest.mark.parametrize("by", ["min_max", "rank"])
def test_an_infinite_measure_is_the_highest_and_the_others_keep_their_scale(by):
    case = make_case()
    divergence_N = case.tokens.reverse_kl_N.clone()
    divergence_N[6] = torch.inf
    scaled_N = Normalised(ReverseKLAt(), by)(case.tokens.with_(reverse_kl_N=divergence_N), Context())
    student_N = case.tokens.authors_N == Author.STUDENT
    assert bool(((scaled_N >= 0) & (scaled_N <= 1)).all())
    assert float(scaled_N[6]) == float(scaled_N[student_N].max())
    others_N = student_N & divergence_N.isfinite()
    assert float(scaled_N[others_N].max()) == (1.0 if by == "min_max" else (int(student_N.sum()) - 2) / student_N.sum())


@dataclass(frozen=True)
class Broken(Measure):
    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        x_N = tokens.student_entropy_N.clone()
        x_N[6] = torch.nan
        return x_N


@pytest.mark.parametrize("chooser", [TopFraction(Broken(), 0.5), TopFraction(Broken(), 0.5, "sequence")])
def test_a_measure_that_is_nan_chooses_no_tokens(chooser: Selector):
    with pytest.raises(EvidenceError, match="measure .* is NaN on 1 tokens"):
        chooser(make_case().tokens, Context())
    with pytest.raises(EvidenceError, match="measure .* is NaN on 1 tokens"):
        Normalised(Broken())(make_case().tokens, Context())


def test_the_borrowed_reverse_kl_of_tokens_that_the_student_cannot_write_is_finite():
    student, teacher, ids, authors = batch()
    student[..., 0] = ZERO
    teacher[..., 0] = ZERO
    ids = ids.clamp_min(1)
    output, gradient = borrowed(VARIANTS["tip"], student, teacher, ids, authors)
    assert output.terms["reverse_kl"].tokens == 5 and bool(gradient.isfinite().all())


def test_a_written_token_without_any_probability_is_refused_by_name():
    """Both models at -inf: the log-ratio would be NaN, and a comparison with NaN drops the token without a word."""
    case = make_case()
    for field in ("student_logprobs_N", "behavior_logprobs_N"):
        bad_N = getattr(case.tokens, field).clone()
        bad_N[6] = ZERO
        with pytest.raises(EvidenceError, match=rf"{field}.*-inf.*1 tokens that the student wrote"):
            VARIANTS["mask_outlier"].objective.plan(case.tokens.with_(**{field: bad_N}))
        prefix_N = getattr(case.tokens, field).clone()
        prefix_N[0] = ZERO  # the teacher's
        VARIANTS["mask_outlier"].objective.plan(case.tokens.with_(**{field: prefix_N}))


def test_mixtures_of_distributions_have_no_gradient_where_both_are_zero():
    logits, teacher = two((3, 0, 2))
    mixed_V = log_mixture(teacher, logits.log_softmax(-1), 0.5)
    assert mixed_V[0, 1] == ZERO
    (gradient,) = torch.autograd.grad(mixed_V[:, [0, 2]].sum(), logits)
    assert bool(gradient.isfinite().all())
    assert float(expected_gap(teacher.exp(), teacher, mixed_V).detach()) > 0


def test_targets_leave_zeros_where_they_are():
    logits, teacher = two((3, 0, 3))
    log_s = logits.detach().log_softmax(-1)
    close(Temperature(2.0)(teacher, log_s).exp().sum(-1), torch.ones(1, dtype=F64))
    for share, same in ((0.0, teacher), (1.0, log_s)):
        close(GeometricBridge(share)(teacher, log_s), same)
    lone_t, lone_s = (two(p)[i] for i, p in ((1, (3, 1, 3)), (0, (3, 1, 3))))
    close(GeometricBridge(0.0)(lone_t, lone_s.detach().log_softmax(-1)), lone_t)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon"])
@pytest.mark.parametrize("naive", [False, True])
def test_divergence_weights_are_finite_for_a_token_that_the_teacher_cannot_write(divergence, naive):
    case = make_case()
    reward_N = torch.full((len(case.tokens),), ZERO, dtype=F64)
    weight_N = DivergenceWeight(divergence, naive)(reward_N, case.tokens, Context())
    expected = {"forward_kl": (0.0, 0.0), "jensen_shannon": (-math.log(2) / 2, -math.log(2) / 2)}[divergence][naive]
    close(weight_N, torch.full_like(weight_N, expected))


def test_a_future_that_does_not_count_is_zero_whatever_it_is():
    case = make_case()
    reward_N = torch.zeros(len(case.tokens), dtype=F64)
    reward_N[12] = ZERO
    future_N = FutureSum(discount=0.0)(reward_N, case.tokens, Context())
    assert int((future_N == ZERO).sum()) == 1 and int(future_N.isnan().sum()) == 0
    assert bool((FutureSum(discount=0.0, current=False)(reward_N, case.tokens, Context()) == 0).all())


@pytest.mark.parametrize("who", ["student", "teacher"])
@pytest.mark.parametrize("sign", [1, -1])
def test_perplexity_weights_stand_a_zero_on_either_side(who, sign):
    case = make_case()
    everyone = TopFraction(ReverseKLAt(), 1.0)
    field = f"{who}_logprobs_N"
    bad_N = getattr(case.tokens, field).clone()
    bad_N[0] = ZERO  # a prefix: it does not count
    same = PerplexityWeight(who, sign, among=everyone)
    close(same(case.tokens.with_(**{field: bad_N}), Context()), same(case.tokens, Context()))
    bad_N[6] = ZERO  # the student's
    weight_N = same(case.tokens.with_(**{field: bad_N}), Context())
    assert bool(weight_N.isfinite().all())
    group = case.tokens.sequences_N[6] // 2
    firsts = [int((case.tokens.sequences_N == s).nonzero()[-1]) for s in (2 * group, 2 * group + 1)]
    assert float(weight_N[6]) == (2.0 if sign == 1 else 0.0) or len(set(firsts)) == 1


def test_infinite_rewards_say_which_token_and_what_to_do():
    student, teacher, ids, authors = batch()
    teacher[1, 3, int(ids[1, 3])] = ZERO
    with pytest.raises(EvidenceError, match="at sequence 1, position 2.*use method"):
        borrowed(VARIANTS["opd"], student, teacher, ids, authors)
    output, gradient = borrowed(VARIANTS["tropd"], student, teacher, ids, authors)
    assert bool(gradient.isfinite().all()) and output.terms["outlier"].tokens > 0
    assert K < V
