"""Clamps, fixed sets of tokens, group advantages and short answers: each against a plain sum over the vocabulary."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.objective.cases import F64, K, V, close, make_case
from tests.objective.test_zeros import PATTERNS, ZERO, kl, mixed, term, two
from tropd.errors import ConfigError, EvidenceError
from tropd.methods import OPSD
from tropd.objective import (
    AtMost,
    Context,
    ForwardKL,
    JensenShannon,
    Objective,
    PolicyGradient,
    ReverseKL,
    StudentView,
    Term,
    Tokens,
)
from tropd.objective.measures import ReverseKLAt
from tropd.objective.rewards import GroupAdvantage
from tropd.objective.selectors import STUDENT, TopFraction
from tropd.objective.support import ids_in
from tropd.types import Author

CLIP = 0.05
PARTS = {
    "forward": (ForwardKL(entry_clip=CLIP), lambda t, s: term(t, s)),
    "reverse": (ReverseKL(entry_clip=CLIP), lambda t, s: term(s, t)),
    "jensen_shannon": (
        JensenShannon(beta=0.3, entry_clip=CLIP),
        lambda t, s: 0.3 * term(t, 0.3 * t + 0.7 * s) + 0.7 * term(s, 0.3 * t + 0.7 * s),
    ),
}
"""Each divergence with a clamp, and what one token adds to it before the clamp."""


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("name", PARTS)
def test_a_clamped_divergence_is_the_sum_of_clamped_entries_whatever_is_impossible(name: str, pattern) -> None:
    loss, part = PARTS[name]
    logits, teacher = two(pattern)
    log_s = logits.log_softmax(-1)
    entries = [part(t, s) for t, s in zip(teacher.exp().tolist()[0], log_s.exp().tolist()[0], strict=True)]
    value = loss.between(teacher, log_s)
    assert float(value.detach()) == pytest.approx(sum(min(x, CLIP) for x in entries), abs=1e-12)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[logits == ZERO] == 0).all())


@pytest.mark.parametrize("name", PARTS)
def test_a_clamped_entry_has_no_gradient_and_the_others_keep_theirs(name: str) -> None:
    loss, _ = PARTS[name]
    case = make_case(4)
    log_s = case.logits.detach().log_softmax(-1).requires_grad_()
    entries = type(loss)(**({"beta": 0.3} if name == "jensen_shannon" else {})).entries(case.teacher, log_s)
    assert 0 < int((entries > CLIP).sum()) < entries.numel()
    (free,) = torch.autograd.grad(entries.sum(), log_s, retain_graph=True)
    (clamped,) = torch.autograd.grad(loss.between(case.teacher, log_s).sum(), log_s)
    assert torch.equal(clamped, torch.where(entries > CLIP, 0.0, free))


@pytest.mark.parametrize("loss", [ForwardKL, ReverseKL, JensenShannon])
def test_a_clamp_that_nothing_reaches_changes_nothing(loss: type) -> None:
    case = make_case()
    with_clamp, without = (Objective(Term("t", STUDENT, loss(entry_clip=clip))) for clip in (1e6, None))
    assert torch.equal(case.gradient(with_clamp), case.gradient(without))


def in_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [ForwardKL(entry_clip=CLIP), JensenShannon(entry_clip=CLIP), ReverseKL(ids=(0, 3, 7))])
def test_clamps_and_fixed_sets_compute_in_single_precision_from_half(loss, dtype: torch.dtype) -> None:
    case = make_case()
    tokens = case.tokens.with_(teacher_full_logprobs_NV=in_half(case.teacher, dtype))
    half = loss(tokens, case.view().with_(full_logprobs_NV=in_half(case.view().full_logprobs_NV, dtype)), None)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), loss(case.tokens, case.view(), None).detach(), rtol=0.05, atol=0.05)


IDS = (7, 0, 3)


def test_reverse_kl_on_a_fixed_set_is_its_sum_over_the_set_and_nothing_else() -> None:
    case = make_case(2)
    full_s = case.logits.log_softmax(-1)
    value = ReverseKL(ids=IDS)(case.tokens, case.view(), None)
    plain = sum(full_s[:, v].exp() * (full_s[:, v] - case.teacher[:, v]) for v in IDS)
    assert isinstance(plain, Tensor)
    close(value, plain, 1e-14)
    close(*(torch.autograd.grad(x.sum(), case.logits, retain_graph=True)[0] for x in (value, plain)), 1e-14)


@pytest.mark.parametrize("loss", [ForwardKL, ReverseKL, JensenShannon])
def test_a_fixed_set_that_is_the_whole_vocabulary_is_the_full_divergence_to_the_last_bit(loss: type) -> None:
    case = make_case(5)
    some, every = (Objective(Term("t", STUDENT, loss(ids=ids))) for ids in (tuple(range(V)), ()))
    assert torch.equal(case.gradient(some), case.gradient(every))


def test_a_fixed_set_with_impossible_tokens_counts_what_can_be_written() -> None:
    for pattern in PATTERNS:
        logits, teacher = two(pattern)
        log_s = logits.log_softmax(-1)
        tokens, view = described(log_s, teacher)
        t, s = teacher.exp().tolist()[0], log_s.exp().tolist()[0]
        value = float(ReverseKL(ids=(2, 1))(tokens, view, None).detach())
        assert value == pytest.approx(term(s[2], t[2]) + term(s[1], t[1]), abs=1e-12)


def described(log_s: Tensor, teacher: Tensor) -> tuple[Tokens, StudentView]:
    case = make_case(lengths=(1,))
    view = StudentView(logprobs_N=log_s[:, 0], full_logprobs_NV=log_s)
    return case.tokens.with_(teacher_full_logprobs_NV=teacher), view


def test_a_fixed_set_is_checked_where_it_is_made_and_against_the_vocabulary() -> None:
    case = make_case()
    with pytest.raises(ConfigError, match="more than once"):
        ReverseKL(ids=(1, 1))
    with pytest.raises(ConfigError, match="support='full'"):
        ReverseKL(ids=(1,), support="teacher_top_k")
    with pytest.raises(ConfigError, match="one token"):
        ReverseKL(ids=(1,), outside="renormalise")
    with pytest.raises(EvidenceError, match=f"token {V} .* the vocabulary has {V}"):
        ReverseKL(ids=(1, V))(case.tokens, case.view(), None)


def test_the_ids_of_a_fixed_set_are_read_from_a_file(tmp_path: Path) -> None:
    (path := tmp_path / "ids.txt").write_text("7 0\n3\n")
    assert ids_in(path) == IDS
    for text in ("7 x", "", "7.5"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="whole numbers"):
            ids_in(path)
    with pytest.raises(ConfigError, match="No such file"):
        ids_in(tmp_path / "none")


def test_group_advantages_with_a_clip_are_grpo_by_hand() -> None:
    """Several sequences per group, drift since the rollout that the clip cuts at both ends, and one group alone."""
    case = make_case(3, lengths=(4, 2, 6, 3, 5))
    drift_N = torch.linspace(-0.6, 0.6, len(case.tokens), dtype=F64)
    tokens = case.tokens.with_(
        authors_N=torch.full_like(case.tokens.authors_N, int(Author.STUDENT)),
        num_actions_S=torch.tensor([4, 2, 6, 3, 5]),
        behavior_logprobs_N=case.tokens.student_logprobs_N - drift_N,
        rewards_S=torch.tensor([1.0, 0.0, 0.25, 1.0, 1.0], dtype=F64),
        groups_S=torch.tensor([0, 0, 0, 0, 1]),
    )
    loss = PolicyGradient(GroupAdvantage(divide=True), clip=0.2, clip_high=0.28)
    objective = Objective(Term("grpo", STUDENT, loss, over="sequences"))
    ours = objective(tokens, case.view(), objective.plan(tokens)).loss

    log_s = case.logits.log_softmax(-1).gather(1, tokens.token_ids_N[:, None]).squeeze(1)
    ratio_N = (log_s - tokens.behavior_logprobs_N).exp()
    advantage_S = torch.zeros(5, dtype=F64)
    four = tokens.rewards_S[:4]
    advantage_S[:4] = (four - four.mean()) / (four.std() + 1e-4)
    advantage_N = advantage_S[tokens.sequences_N]
    gain_N = torch.minimum(ratio_N * advantage_N, ratio_N.clamp(0.8, 1.28) * advantage_N)
    assert bool((ratio_N > 1.28).any()) and bool((ratio_N < 0.8).any())
    plain = -torch.stack([gain_N[tokens.sequences_N == s].mean() for s in range(5)]).mean()
    close(ours, plain, 1e-12)
    close(*(torch.autograd.grad(x, case.logits, retain_graph=True)[0] for x in (ours, plain)), 1e-12)


def test_equal_rewards_of_a_group_give_no_advantage() -> None:
    case = make_case(lengths=(3, 3, 3))
    tokens = case.tokens.with_(rewards_S=torch.full((3,), 0.1), groups_S=torch.zeros(3, dtype=torch.int64))
    advantage_N = GroupAdvantage(divide=True)(torch.zeros(9), tokens, Context())
    assert float(advantage_N.abs().max()) < 1e-3


def test_an_upper_clip_alone_is_refused() -> None:
    with pytest.raises(ConfigError, match="clip_high"):
        PolicyGradient(clip_high=0.28)


def test_a_clamped_loss_has_no_gradient_above_the_clamp_and_the_same_below() -> None:
    case = make_case()
    inner = ReverseKL()
    loss_N = inner(case.tokens, case.view(), None)
    bound = float(loss_N.detach().median())
    clamped_N = AtMost(inner, nats=bound)(case.tokens, case.view(), None)
    close(clamped_N, loss_N.clamp(max=bound), 0.0)
    (free,) = torch.autograd.grad(loss_N.sum(), case.logits)
    (clamped,) = torch.autograd.grad(clamped_N.sum(), case.logits)
    assert torch.equal(clamped, torch.where(loss_N[:, None] > bound, 0.0, free))


def test_an_infinite_loss_that_is_clamped_has_no_gradient_instead_of_nan() -> None:
    case = make_case()
    teacher = case.teacher.clone()
    teacher[3, 2] = ZERO
    tokens = case.tokens.with_(teacher_full_logprobs_NV=teacher)
    loss_N = AtMost(ReverseKL(), nats=50.0)(tokens, case.view(), None)
    (gradient,) = torch.autograd.grad(loss_N.sum(), case.logits)
    assert float(loss_N[3].detach()) == 50.0 and not bool(gradient[3].any())
    others = torch.arange(len(teacher)) != 3
    (free,) = torch.autograd.grad(ReverseKL()(case.tokens, case.view(), None)[others].sum(), case.logits)
    close(gradient, free, 1e-14)


def test_clamping_at_a_quantile_of_the_batch_is_leaving_out_the_tokens_above_it() -> None:
    case = make_case()
    student_N = case.tokens.authors_N == Author.STUDENT
    left_out = Objective(Term("t", STUDENT & ~TopFraction(ReverseKLAt(), 0.2), ReverseKL()))
    ranked = case.tokens.reverse_kl_N[student_N].sort(descending=True).values
    below = float(ranked[math.ceil(0.2 * len(ranked))])  # the largest that stays
    clamped = Objective(Term("t", STUDENT, AtMost(ReverseKL(), nats=below + 1e-9)))
    close(case.gradient(left_out), case.gradient(clamped), 1e-14)


def with_bucket(p: Tensor, q: Tensor, ids: list[int]) -> tuple[list[float], list[float]]:
    """Both distributions on the ids and one entry for the rest."""
    return tuple([*(float(x[v]) for v in ids), 1.0 - sum(float(x[v]) for v in ids)] for x in (p, q))  # type: ignore


PUBLISHED = {
    "multi-rollout": JensenShannon(beta=0.5, support="teacher_top_k", top_k=K, outside="bucket"),
    "sdpo": ReverseKL(support="student_top_k", top_k=K, outside="bucket"),
    "ptd": JensenShannon(beta=0.5, support="union", top_k=K, outside="bucket"),
}
"""Supports of a likeliest few and one entry for the rest, as published; the papers take 100, 20 and 100."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_support_with_a_bucket_is_the_published_divergence_by_hand(name: str) -> None:
    case, loss = make_case(6), PUBLISHED[name]
    value_N = loss(case.tokens, case.view(), None).detach()
    for n in range(len(case.tokens)):
        t, s = case.teacher[n].exp(), case.logits[n].detach().softmax(-1)
        top = {"multi-rollout": [t], "sdpo": [s], "ptd": [t, s]}[name]
        ids = sorted({v for x in top for v in x.topk(K).indices.tolist()})
        p, q = with_bucket(t, s, ids)
        m = mixed(p, q, 0.5)
        by_hand = kl(q, p) if name == "sdpo" else 0.5 * kl(p, m) + 0.5 * kl(q, m)
        assert float(value_N[n]) == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_bucket_of_a_single_token_is_the_whole_divergence_with_its_gradient(name: str) -> None:
    case = make_case(6, top_k=V - 1)
    small = Objective(Term("t", STUDENT, replace(PUBLISHED[name], top_k=V - 1)))
    whole = Objective(Term("t", STUDENT, ReverseKL() if name == "sdpo" else JensenShannon()))
    close(case.gradient(small), case.gradient(whole), 1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_opsd_on_the_teachers_likeliest_tokens_is_the_released_loss_by_hand(beta: float) -> None:
    """Both sides renormalised on the teacher's top-k, each entry clamped, then summed."""
    case = make_case(8)
    objective = OPSD(beta=beta, teacher_top_k=K, entry_clip=CLIP).objective
    ours_N = objective.terms[0].loss(case.tokens, case.view(), None)
    ids_NK = case.teacher.topk(K).indices
    t, s = (x.gather(1, ids_NK).log_softmax(-1) for x in (case.teacher, case.logits))
    m = (beta * t.exp() + (1 - beta) * s.exp()).log()
    forward, reverse = t.exp() * (t - m), s.exp() * (s - m)
    entries = {0.0: t.exp() * (t - s), 1.0: s.exp() * (s - t)}.get(beta, beta * forward + (1 - beta) * reverse)
    plain_N = entries.clamp(max=CLIP).sum(-1)
    close(ours_N, plain_N, 1e-12)
    close(*(torch.autograd.grad(x.sum(), case.logits, retain_graph=True)[0] for x in (ours_N, plain_N)), 1e-12)
