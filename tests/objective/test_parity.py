"""The same numbers as code that others wrote, and as plain autograd."""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import K, close, make_case
from tropd.methods import OPD, TrOPD
from tropd.objective import ForwardKL, JensenShannon, ReverseKL, distillation_loss
from tropd.objective.draws import uniform
from tropd.types import key_of


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_jensen_shannon_is_trls(beta):
    gkd = pytest.importorskip("trl.experimental.gkd")
    case = make_case()
    ours = JensenShannon(beta=beta)(case.tokens, case.view(), None)
    theirs = gkd.GKDTrainer.generalized_jsd_loss(case.logits[None], case.teacher[None], beta=beta, reduction="none")
    close(ours, theirs.sum(-1).flatten())


def test_the_directions_of_kl_are_trls():
    gkd = pytest.importorskip("trl.experimental.gkd")
    case = make_case()
    for beta, loss in ((0.0, ForwardKL()), (1.0, ReverseKL())):
        theirs = gkd.GKDTrainer.generalized_jsd_loss(case.logits[None], case.teacher[None], beta=beta, reduction="none")
        close(loss(case.tokens, case.view(), None), theirs.sum(-1).flatten())


def test_the_directions_of_kl_by_hand():
    """Two tokens, teacher (1/2, 1/2), student (3/4, 1/4)."""
    t, s = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.75, 0.25]]).double().log()
    assert float(ForwardKL().between(t, s)) == pytest.approx(0.14384103622589045)
    assert float(ReverseKL().between(t, s)) == pytest.approx(0.13081203594113697)


def test_tropd_is_a_plain_autograd_reference_written_from_the_paper():
    g = torch.Generator().manual_seed(0)
    B, T, vocab, beta = 4, 9, 13, 0.001
    z = torch.randn(B, T, vocab, generator=g, dtype=torch.float64).requires_grad_()
    teacher = (2 * torch.randn(B, T, vocab, generator=g, dtype=torch.float64)).log_softmax(-1)
    ids = torch.randint(vocab, (B, T), generator=g)
    authors = torch.ones(B, T, dtype=torch.long)
    authors[:, 0], authors[:2, 1:4] = 0, 2
    loss = distillation_loss(
        TrOPD(top_k=K), token_ids=ids, authors=authors, logits=z, teacher_logits=teacher, seed=5, rollout_ids="abcd"
    ).loss

    log_s = z.log_softmax(-1)
    s, t = (x.gather(-1, ids[..., None]).squeeze(-1) for x in (log_s, teacher))
    a = (t - s).detach()
    keys = torch.tensor([key_of(5, name) for name in "abcd"])
    positions = ((authors > 0).long().cumsum(1) - 1).clamp_min(0)
    m = (uniform(keys[:, None].expand(B, T), positions) < a.clamp(max=0).exp()).double()
    top = teacher.topk(K, -1)
    fkl = (top.values.exp() * (top.values - log_s.gather(-1, top.indices))).sum(-1)
    on_policy = -(m * a).detach() * s + (1 - m) * fkl
    per_token = torch.where(authors == 1, on_policy, torch.where(authors == 2, -beta * s, 0.0))
    reference = per_token.sum() / (authors > 0).sum()
    close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (loss, reference)), 1e-14)
    assert 0 < float(m.mean()) < 1


def test_discounted_opd_is_the_reverse_cumulative_sum_of_the_published_code():
    g = torch.Generator().manual_seed(1)
    z = torch.randn(2, 5, 7, generator=g, dtype=torch.float64).requires_grad_()
    teacher, ids = torch.randn(2, 5, 7, generator=g, dtype=torch.float64), torch.randint(7, (2, 5), generator=g)
    ours = distillation_loss(
        OPD(discount=0.9), token_ids=ids, authors=torch.ones_like(ids), logits=z, teacher_logits=teacher
    ).loss
    s, t = (x.log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1) for x in (z, teacher))
    a = (t - s).detach()
    future = torch.stack([sum(0.9 ** (i - j) * a[:, i] for i in range(j, 5)) for j in range(5)], 1)
    close(*(torch.autograd.grad(x, z, retain_graph=True)[0] for x in (ours, -(future * s).mean())))
