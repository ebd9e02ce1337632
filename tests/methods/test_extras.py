"""Extras change any method's objective once, whatever the cut of the batch; controls weigh without looking."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.objective.cases import K, close, make_case
from tests.objective.ranks import on_ranks
from tests.objective.variants import VARIANTS
from tropd.errors import ConfigError
from tropd.methods import METHODS, OPD, Method, SeqKD, TrOPD
from tropd.methods.controls import FirstWindow, RandomlyPlacedWindow, RandomMask, ShuffledWeights
from tropd.methods.extras import Choose, Extra, Judge
from tropd.objective import Context, Objective, Term, Tokens
from tropd.objective.controls import AtRandom, RandomWindow, Shuffled
from tropd.objective.examples import some_tokens
from tropd.objective.rewards import Clip
from tropd.objective.selectors import STUDENT, TopFraction, TrustRegion
from tropd.objective.terms import Reward, Selector
from tropd.types import Author, key_of

warnings.simplefilter("ignore")

CONTROLS: dict[str, Extra] = {
    "random_mask": RandomMask(share=0.4),
    "random_window": RandomlyPlacedWindow(length=2),
    "first_window": FirstWindow(length=2),
    "shuffled_weights": ShuffledWeights(),
}
CONTROLLED: dict[str, Method] = {
    f"{method.name}+{name}": replace(method, plus=(extra,))
    for method in (OPD(), TrOPD(top_k=K, trust="soft"), METHODS["reopold"](), METHODS["tip"]())
    for name, extra in CONTROLS.items()
}


@dataclass(frozen=True, kw_only=True)
class Bounded(Judge):
    """Rewards between -1 and 1."""

    @property
    def link(self) -> Reward:
        return Clip(-1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Sub(OPD):
    """Builds on the objective of another class, which builds on nothing."""

    @property
    def objective(self) -> Objective:
        return Objective(*(replace(term, name=f"sub_{term.name}") for term in super().objective.terms))


@dataclass(frozen=True, kw_only=True)
class SubSub(Sub):
    """Builds on one that builds on another."""

    @property
    def objective(self) -> Objective:
        return Objective(*(replace(term, weight=2.0) for term in super().objective.terms))


@dataclass(frozen=True, kw_only=True)
class Quiet(SubSub):
    """Defines no objective of its own."""


def responses(*lengths: int, seed: int = 0) -> Tokens:
    """The student's alone, with a log-ratio at random."""
    g = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    sequences_N = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return some_tokens(
        sequences_N=sequences_N,
        student_logprobs_N=-torch.rand(n, generator=g),
        teacher_logprobs_N=-torch.rand(n, generator=g),
        keys_S=torch.tensor([key_of(seed, number) for number in range(len(lengths))]),
    )


def weights_of(method: Method, tokens: Tokens, **context) -> dict[str, Tensor]:
    return dict(method.objective.plan(tokens, Context(progress=0.3, **context)).weights)


def selected(method: Method, tokens: Tokens) -> dict[str, Tensor]:
    """What each term selects, before it is divided by anything."""
    return {term.name: term.where(tokens, Context(progress=0.3)) for term in method.objective.terms}


@pytest.mark.parametrize("name", CONTROLLED)
def test_the_same_tokens_are_weighed_in_any_order_and_on_any_ranks(name):
    tokens, method = make_case().tokens, CONTROLLED[name]
    whole = weights_of(method, tokens)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(1))
    for term, weight_N in weights_of(method, tokens.rows(order)).items():
        close(weight_N, whole[term][order], 1e-15)
    for split in ([[0, 1, 2], [3, 4, 5]], [[5], [0, 3], [1, 2, 4]]):
        for rows, found in on_ranks(tokens, split, lambda own, world: weights_of(method, own, world=world)):
            for term, weight_N in found.items():
                close(weight_N, whole[term][rows], 1e-15)


@pytest.mark.parametrize("name", CONTROLLED)
def test_any_cut_into_micro_batches_gives_the_same_gradient(name):
    case, objective = make_case(), CONTROLLED[name].objective
    plan = objective.plan(case.tokens, Context(progress=0.3))
    cuts = [0, 1, 9, 26]
    loss = sum(
        objective(case.tokens.rows(rows), case.view(rows), plan.rows(rows)).loss
        for rows in (slice(low, high) for low, high in itertools.pairwise(cuts))
    )
    close(torch.autograd.grad(loss, case.logits)[0], case.gradient(objective), 1e-12)


@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("lengths", [(1,), (7,), (3, 1, 9, 40)])
def test_a_random_mask_keeps_its_share_rounded_up_and_looks_at_nothing(share, lengths):
    tokens = responses(*lengths)
    kept_N = TopFraction(AtRandom(), share)(tokens, Context())
    assert int(kept_N.sum()) == -int(-share * sum(lengths) // 1)
    other = tokens.with_(teacher_logprobs_N=-5 * torch.rand(len(tokens)), student_logprobs_N=-torch.rand(len(tokens)))
    assert torch.equal(TopFraction(AtRandom(), share)(other, Context()), kept_N)


def test_two_random_masks_of_other_shares_keep_the_same_tokens_first():
    tokens = responses(3, 1, 9, 40)
    few, many = (TopFraction(AtRandom(), share)(tokens, Context()) for share in (0.2, 0.6))
    assert bool((many >= few).all())


@pytest.mark.parametrize("window", [RandomlyPlacedWindow, FirstWindow])
@pytest.mark.parametrize("length", [1, 2, 5, 100])
def test_a_window_lies_in_each_response_and_is_as_long_as_the_response_allows(window, length):
    """In the case, the teacher begins some responses and writes one alone, and a tool speaks in the middle of one."""
    tokens = make_case().tokens
    weight_N = weights_of(replace(OPD(), plus=(window(length=length),)), tokens)["reverse_kl"]
    for sequence in range(6):
        own = (tokens.sequences_N == sequence) & (tokens.authors_N == Author.STUDENT)
        places = tokens.num_before_N[own][weight_N[own] > 0].tolist()
        assert len(places) == min(length, int(own.sum()))
        assert places == list(range(places[0], places[0] + len(places))) if places else True
        assert window is RandomlyPlacedWindow or not places or places[0] == 0
    assert float(weight_N[tokens.authors_N != Author.STUDENT].abs().sum()) == 0


def test_a_random_window_begins_at_every_place_equally_often():
    """4 places for 3 of 6 tokens, 4,000 responses: 1,000 each, and 5 standard deviations are 137."""
    tokens = responses(*[6] * 4000)
    weight_ST = RandomWindow(3)(tokens, Context()).view(4000, 6)
    starts = Counter(weight_ST.argmax(1).tolist())
    assert sorted(starts) == [0, 1, 2, 3] and all(abs(count - 1000) < 137 for count in starts.values())


def test_windows_leave_the_teachers_tokens_alone():
    tokens = make_case().tokens
    method = TrOPD(top_k=K, beta=1.0)
    theirs = tokens.authors_N == Author.TEACHER
    for name in CONTROLS:
        plain, controlled = (weights_of(m, tokens) for m in (method, replace(method, plus=(CONTROLS[name],))))
        for term in plain:
            assert torch.equal(plain[term][theirs], controlled[term][theirs]), (name, term)


@pytest.mark.parametrize("name", [n for n, m in VARIANTS.items() if isinstance(m, Method)])
def test_shuffled_weights_are_the_methods_own_on_other_tokens(name):
    """What all terms say of one of the student's tokens, they say together of another one."""
    tokens, method = make_case().tokens, VARIANTS[name]
    plain, dealt = selected(method, tokens), selected(replace(method, plus=(ShuffledWeights(),)), tokens)
    ours = tokens.authors_N == Author.STUDENT
    rows = [torch.stack([w[term][ours] for term in plain], -1).tolist() for w in (plain, dealt)]
    assert sorted(rows[0]) == sorted(rows[1])
    for term in plain:
        assert torch.equal(plain[term][~ours], dealt[term][~ours])


def test_shuffled_trust_still_gives_every_token_one_of_two_lessons():
    tokens, method = make_case().tokens, TrOPD(top_k=K)
    weights = selected(replace(method, plus=(ShuffledWeights(),)), tokens)
    ours = tokens.authors_N == Author.STUDENT
    assert torch.equal((weights["trusted"] + weights["outlier"])[ours], torch.ones(int(ours.sum())).double())
    assert not torch.equal(weights["trusted"], selected(method, tokens)["trusted"])


def test_shuffled_weights_fall_on_each_token_equally_often():
    """One weight among five tokens, dealt in 4,000 batches: 800 each, and 5 standard deviations are 127."""
    counts = torch.zeros(5)
    for seed in range(4000):
        tokens = responses(5, seed=seed)
        counts += (
            Shuffled(TopFraction(AtRandom(), 0.2))(tokens, Context())
            if seed % 2
            else Shuffled(First())(tokens, Context())
        )
    assert float(counts.sum()) == 4000 and bool(((counts - 800).abs() < 127).all())


@dataclass(frozen=True)
class First(Selector):
    """1 on the first token."""

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return (tokens.positions_N == 0).float()


def test_soft_weights_survive_the_shuffle():
    tokens = responses(4, 6, 9)
    weight_N, dealt_N = (
        selector(tokens, Context()) for selector in (TrustRegion("soft"), Shuffled(TrustRegion("soft")))
    )
    assert sorted(weight_N.tolist()) == sorted(dealt_N.tolist()) and not torch.equal(weight_N, dealt_N)


def test_nothing_is_shuffled_where_the_student_wrote_nothing_or_one_token():
    alone = some_tokens(token_ids_N=[5, 6], authors_N=[int(Author.TEACHER)] * 2)
    one = some_tokens(token_ids_N=[5, 6], authors_N=[int(Author.TEACHER), int(Author.STUDENT)])
    for tokens in (alone, one):
        assert torch.equal(Shuffled(First())(tokens, Context()), First()(tokens, Context()))
    assert float(RandomWindow(2)(alone, Context()).sum()) == 0.0


@pytest.mark.parametrize("cls", [OPD, Sub, SubSub, Quiet])
def test_an_extra_is_applied_once_however_classes_build_on_each_other(cls):
    (term,) = cls(plus=(RandomMask(share=0.5), FirstWindow(length=3))).objective.terms
    (plain,) = cls().objective.terms
    mask = f"({TopFraction(AtRandom(), 0.5)} | ~student)"
    assert str(term.where).startswith(f"{plain.where} & {mask}") and str(term.where).count("TopFraction") == 1
    assert str(term.where).index("TopFraction") < str(term.where).index("PositionBelow")
    assert (term.name, term.weight) == (plain.name, plain.weight)


def test_a_method_made_of_another_method_gets_the_extras_of_both():
    inner = TrOPD(top_k=K, plus=(FirstWindow(length=2),))
    outer = METHODS["tropd_aopd"](tropd=inner, plus=(RandomMask(share=0.5),))
    where = {term.name: str(term.where) for term in outer.objective.terms}
    assert "PositionBelow" in where["trusted"] and "AtRandom" in where["trusted"]
    assert "PositionBelow" not in where["aopd_guide"] and "AtRandom" in where["aopd_guide"]


def test_a_judge_is_the_last_link_of_every_reward():
    (term,) = OPD(plus=(Bounded(),)).objective.terms
    tokens = some_tokens(student_logprobs_N=[-0.5, -0.5], teacher_logprobs_N=[-0.75, -9.0])
    plan = Objective(term).plan(tokens, Context())
    assert plan.rewards["reverse_kl"].tolist() == [-0.25, -1.0]


@pytest.mark.parametrize("name", METHODS)
def test_an_extra_on_any_method_builds_or_is_refused_with_one_sentence(name):
    for extra in (*CONTROLS.values(), Bounded()):
        cls = METHODS[name]
        try:
            method = cls(plus=(extra,))
        except ConfigError as refusal:
            assert isinstance(extra, Judge) and "no term of the method has a reward" in str(refusal)
            assert all(term.loss.reward is None for term in cls().objective.terms)
        else:
            assert len(method.objective.terms) == len(cls().objective.terms)
            assert method.objective.needs & cls().objective.needs == cls().objective.needs


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        (lambda: OPD(plus=("random_mask",)), "method.plus holds 'random_mask'. Give objects of an Extra"),
        (lambda: SeqKD(plus=(Bounded(),)), "no term of the method has a reward. Put it on a method that has one"),
        (lambda: RandomMask(share=0.0), "method.plus.share = 0.0"),
        (lambda: RandomMask(share=1.5), "method.plus.share = 1.5"),
        (lambda: RandomlyPlacedWindow(length=0), "method.plus.length = 0"),
        (lambda: FirstWindow(length=-1), "method.plus.length = -1"),
    ],
)
def test_what_cannot_be_made_is_told(extra, says):
    with pytest.raises(ConfigError, match=says):
        extra()


@pytest.mark.parametrize("base", [Extra, Choose, Judge])
def test_an_extra_that_changes_nothing_says_what_it_lacks(base):
    @dataclass(frozen=True, kw_only=True)
    class Empty(base):
        pass

    with pytest.raises(NotImplementedError, match=r"Empty (changes|chooses|judges) nothing: .* defines `?"):
        OPD(plus=(Empty(),))


def test_a_term_that_weighs_no_students_token_is_left_as_it_is():
    term = SeqKD(plus=(RandomMask(share=0.1),)).objective.terms[0]
    tokens = some_tokens(token_ids_N=[5, 6, 7], authors_N=[int(Author.TEACHER)] * 3)
    assert Objective(term).plan(tokens, Context()).weights[term.name].gt(0).all()
    assert isinstance(term, Term) and not isinstance(term.where, type(STUDENT))
