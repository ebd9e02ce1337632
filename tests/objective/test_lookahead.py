"""The lookahead bonus: by hand, its zeros, its gradient by enumeration, and whom it asks beyond which tokens."""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import K, close, expected_gradient, gradient_of, make_case, one_state, pair, reverse_kl
from tropd.errors import ConfigError
from tropd.methods import LGR, OPD
from tropd.methods.lgr import Lookahead
from tropd.objective import Context, Objective, PolicyGradient, Term
from tropd.objective.evidence import Tokens
from tropd.objective.lookahead import LookaheadBonus, candidates_of
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT
from tropd.objective.support import NOTHING
from tropd.types import READER, Author


def bonus(tokens: Tokens, **knobs) -> torch.Tensor:
    return LookaheadBonus(**{"top_k": K, "nats": 0.0, **knobs})(torch.zeros(len(tokens)).double(), tokens, Context())


def test_the_bonus_is_the_standing_of_the_written_token_among_the_candidates():
    tokens = make_case(3).tokens
    found_N = bonus(tokens, scale=0.7)
    for n in range(len(tokens)):
        sure_J = tokens.teacher_lookahead_NJ[n].exp().numpy()
        z_J = (sure_J - sure_J.mean()) / sure_J.std()
        standing = dict(zip(tokens.student_topk_ids_NJ[n].tolist(), z_J.tolist(), strict=True))
        assert float(found_N[n]) == pytest.approx(0.7 * standing.get(int(tokens.token_ids_N[n]), 0.0), abs=1e-12)
    assert int((found_N != 0).sum()) > 3 and int((found_N == 0).sum()) > 3


def test_one_candidate_has_no_bonus():
    tokens = make_case(3).tokens
    one = tokens.with_(
        teacher_lookahead_NJ=tokens.teacher_lookahead_NJ[:, :1], token_ids_N=tokens.student_topk_ids_NJ[:, 0]
    )
    assert not bonus(one, top_k=1).any()


def test_candidates_that_lead_to_the_same_have_no_bonus():
    tokens = make_case(3).tokens
    for log_sure in (-0.3, 0.0, -torch.inf):
        same = torch.full_like(tokens.teacher_lookahead_NJ, log_sure)
        near = (same.exp() + 1e-8 * torch.arange(K)).clamp(max=1.0).log()
        assert not bonus(tokens.with_(teacher_lookahead_NJ=same)).any()
        assert float(bonus(tokens.with_(teacher_lookahead_NJ=near)).abs().max()) < 1e-3, "rounding is no lead"


def test_a_teacher_that_is_lost_after_a_candidate_is_the_worst_and_finite():
    tokens = make_case(3).tokens
    beyond = tokens.teacher_lookahead_NJ.clone()
    beyond[:, 0] = -torch.inf
    written = tokens.with_(teacher_lookahead_NJ=beyond, token_ids_N=tokens.student_topk_ids_NJ[:, 0])
    found_N = bonus(written)
    assert bool((found_N < 0).all()) and bool(found_N.isfinite().all())


def test_nobody_asks_where_the_student_is_sure_or_wrote_nothing():
    tokens = make_case(3).tokens
    nats = float(tokens.student_entropy_N.median())
    objective = LGR(top_k=K, nats=nats).objective
    asked_N = (tokens.authors_N == Author.STUDENT) & (tokens.student_entropy_N > nats)
    ids_NJ = candidates_of(objective, tokens, READER)
    assert torch.equal(ids_NJ[asked_N], tokens.student_topk_ids_NJ[asked_N]) and bool(ids_NJ[~asked_N].eq(-1).all())
    answered = tokens.with_(teacher_lookahead_NJ=tokens.teacher_lookahead_NJ.masked_fill(~asked_N[:, None], NOTHING))
    assert not bonus(answered)[~asked_N].any() and bool(bonus(answered)[asked_N].any())


def test_the_first_candidates_of_a_wider_top_k_are_asked():
    tokens = make_case(3).tokens
    student_N = tokens.authors_N == Author.STUDENT
    ids_NJ = candidates_of(LGR(top_k=2, nats=0.0).objective, tokens, READER)
    assert torch.equal(ids_NJ[student_N], tokens.student_topk_ids_NJ[student_N, :2])


def test_two_lookaheads_beyond_different_tokens_are_refused():
    losses = [PolicyGradient(LookaheadBonus(top_k=k)) for k in (2, 3)]
    objective = Objective(*(Term(str(i), STUDENT, loss) for i, loss in enumerate(losses)))
    with pytest.raises(ConfigError, match="2 parts of the method look ahead"):
        candidates_of(objective, make_case().tokens, READER)


@pytest.mark.parametrize("gamma", [0.0, 1.0, -0.4])
def test_the_expected_gradient_is_reverse_kls_minus_the_gradient_of_the_expected_bonus(gamma):
    logits, teacher = pair()
    loss = PolicyGradient(chain(LogRatio(), LookaheadBonus(gamma, K, 0.0)))
    z_V = bonus(one_state(logits, teacher).tokens).detach()
    expected = gradient_of(reverse_kl(teacher), logits) - gamma * gradient_of(lambda s: (s.exp() * z_V).sum(), logits)
    close(expected_gradient(loss, logits, teacher), expected)


def test_as_an_extra_it_is_the_last_link_of_a_methods_reward():
    case = make_case(3)
    extra = OPD(plus=(Lookahead(gamma=0.5, top_k=K, nats=0.1),)).objective
    close(case.gradient(extra), case.gradient(LGR(gamma=0.5, top_k=K, nats=0.1).objective), 0.0)
