"""Which tokens a selector takes, against counting by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.objective.cases import F64, close, make_case
from tropd.errors import ConfigError
from tropd.objective import Context, NegativeLogLikelihood, Objective, PolicyGradient, Term
from tropd.objective.evidence import Needs, Tokens, around
from tropd.objective.places import FirstOf, LastPositions, PositionBelow, Shortest
from tropd.objective.rewards import LogRatio, chain
from tropd.objective.selectors import STUDENT, Everywhere, PerplexityWeight, TopFraction, Verified
from tropd.objective.terms import Measure, Reward, Selector
from tropd.training.batches import make_tokens
from tropd.types import Author, Prompt, Rollout

C, S, T, E = Author.CONTEXT, Author.STUDENT, Author.TEACHER, Author.ENVIRONMENT


def tokens_of(*responses: str, ids: tuple[tuple[int, ...], ...] | None = None, **evidence: Tensor) -> Tokens:
    """Responses spelled by their authors, such as "TTSSES"."""
    by_letter = {"C": C, "S": S, "T": T, "E": E}
    authors = [[by_letter[c] for c in response] for response in responses]
    ids = ids or tuple(tuple(range(3, 3 + len(row))) for row in authors)
    rollouts = [
        Rollout(
            id=f"r{n}",
            prompt=Prompt(id="p", token_ids=(1,)),
            token_ids=(1, *row),
            authors=(C, *who),
            behavior_logprobs=(0.0,) * (1 + len(row)),
        )
        for n, (row, who) in enumerate(zip(ids, authors, strict=True))
    ]
    return make_tokens(rollouts, 0, torch.device("cpu"), None).with_(**evidence)


def chosen(selector: Selector, tokens: Tokens) -> str:
    """1 or 0 for each token."""
    return "".join(f"{x:g}" for x in selector(tokens, Context()).tolist())


def test_last_positions_count_the_students_tokens_around_a_tools_answer():
    assert chosen(STUDENT & LastPositions(3), tokens_of("SSSEEEESS")) == "001000011"
    assert chosen(LastPositions(3), tokens_of("SSSEEEESS")) == "001000011"


def test_last_positions_do_not_count_a_teachers_prefix():
    assert chosen(STUDENT & LastPositions(3), tokens_of("TTTTSS", "TTSSSS")) == "000011" + "000111"


def test_first_positions_count_neither_a_prefix_nor_a_tools_answer():
    assert chosen(STUDENT & PositionBelow(3), tokens_of("TTSEESSSS")) == "001001100"
    assert chosen(PositionBelow(2), tokens_of("EESSS")) == "00110"


def test_a_text_that_the_teacher_wrote_has_first_and_last_tokens_of_its_own():
    assert chosen(PositionBelow(2), tokens_of("TTTT")) == "1100"
    assert chosen(LastPositions(1), tokens_of("TTTT")) == "0001"


@pytest.mark.parametrize("selector", [PositionBelow(2), LastPositions(2), FirstOf((3, 4))])
def test_places_are_those_of_the_whole_batch_however_it_is_cut(selector):
    tokens = tokens_of("TSSES", "SSS", "E", "STS", ids=((3, 3, 4, 3, 4), (4, 4, 3), (3,), (3, 4, 4)))
    whole = selector(tokens, Context())
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    assert torch.equal(selector(tokens.rows(order), Context()), whole[order])
    if selector.reach == 0:
        parts = [selector(tokens.rows(slice(n, n + 1)), Context()) for n in range(len(tokens))]
        assert torch.equal(torch.cat(parts), whole)


def test_places_are_counted_for_each_author():
    sequences, authors = torch.tensor([0, 0, 0, 0, 1, 1, 1]), torch.tensor([2, 1, 3, 1, 1, 1, -1])
    before, after = around(sequences, authors)
    assert before[[0, 1, 3, 4, 5]].tolist() == [0, 0, 1, 0, 1] and after[[0, 1, 3, 4, 5]].tolist() == [0, 1, 0, 1, 0]
    assert [x.numel() for x in around(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))] == [0, 0]


def test_first_of_takes_each_id_once_in_each_response():
    ids = ((7, 9, 7, 9, 8), (9, 9, 7, 7, 7))
    assert chosen(FirstOf((7, 9)), tokens_of("SSSSS", "SSSSS", ids=ids)) == "11000" + "10100"
    assert chosen(FirstOf((7, 9)), tokens_of("TSSSS", "ESSSS", ids=ids)) == "01100" + "01100"
    assert chosen(FirstOf(()), tokens_of("SSSSS", "SSSSS", ids=ids)) == "0" * 10


def perplexity_weights(*responses: str, logprobs: Tensor, among: Selector = Everywhere()) -> list[float]:  # noqa: B008
    tokens = tokens_of(*responses, student_logprobs_N=logprobs)
    weight_N = PerplexityWeight("student", +1, among)(tokens, Context())
    return [float(weight_N[tokens.sequences_N == s].max()) for s in range(len(responses))]


def test_a_teachers_prefix_takes_no_part_in_a_perplexity():
    """Two sequences that the student finds equally surprising have equal weights, whatever stands before them."""
    logprobs = torch.tensor([-3.0, -3.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    assert perplexity_weights("TTSSS", "SS", logprobs=logprobs) == pytest.approx([1.0, 1.0], abs=1e-6)
    logprobs = torch.tensor([-1.0, 0.0, 0.0, -1.0, -2.0, -2.0])
    ratio = math.exp(2.0 - 1.0)
    expected = [2 / (1 + ratio), 2 * ratio / (1 + ratio)]
    assert perplexity_weights("SEES", "SS", logprobs=logprobs) == pytest.approx(expected, abs=1e-6)


def test_a_perplexity_is_that_of_the_tokens_that_take_part():
    logprobs = torch.tensor([-1.0, -9.0, -1.0, -1.0])
    assert perplexity_weights("SS", "SS", logprobs=logprobs, among=PositionBelow(1)) == pytest.approx([1.0, 1.0])


class Given(Measure):
    """The scores that a test gives, as the student's entropy."""

    own_needs = Needs.STUDENT_ENTROPY

    def parts(self):  # no dataclass, so no fields
        return iter(())

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return tokens.student_entropy_N


def top(fraction: float, scope: str, responses: tuple[str, ...], scores: list[float]) -> str:
    tokens = tokens_of(*responses, student_entropy_N=torch.tensor(scores))
    return chosen(TopFraction(Given(), fraction, scope), tokens)  # type: ignore[arg-type]


@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("size", range(1, 41))
def test_a_share_of_n_tokens_is_rounded_up_exactly_once(scope, size):
    """With shares that no binary fraction holds: 0.2 of 5 is 1, and float32 says 1.0000000149."""
    scores = torch.randperm(size, generator=torch.Generator().manual_seed(size)).float().tolist()
    for tenths in range(1, 11):
        kept = top(tenths / 10, scope, ("S" * size,), scores).count("1")
        assert kept == -(-size * tenths // 10), f"{tenths / 10} of {size}"


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_ties_at_the_cut_are_kept(scope):
    assert top(0.25, scope, ("SSSS",), [1.0, 2.0, 2.0, 0.0]) == "0110"
    assert top(0.5, scope, ("SSSS",), [1.0, 1.0, 1.0, 1.0]) == "1111"


def test_a_share_of_a_sequence_is_of_the_students_tokens_there():
    scores = [9.0, 9.0, 1.0, 2.0, 3.0, 4.0, 5.0, 9.0, 7.0, 8.0]
    assert top(0.5, "sequence", ("TTSSSS", "S", "ESS"), scores) == "000011" + "1" + "001"
    assert top(0.2, "batch", ("TTSSSS", "S", "ESS"), scores) == "000000" + "0" + "011"


def test_scores_of_minus_infinity_are_the_lowest_but_still_scores():
    assert top(0.5, "sequence", ("ESSSS",), [0.0, -math.inf, 3.0, -math.inf, -math.inf]) == "01111"
    assert top(0.25, "sequence", ("ESSSS",), [0.0, -math.inf, 3.0, -math.inf, -math.inf]) == "00100"


class Head(Selector):
    """Where the teacher's `teacher_top_k` likeliest tokens hold more than half."""

    own_needs = Needs.TOPK
    teacher_top_k = 7

    def parts(self):
        return iter(())

    def __call__(self, tokens: Tokens, context: Context) -> Tensor:
        return (tokens.teacher_topk_logprobs_NK[:, : self.teacher_top_k].exp().sum(-1) > 0.5).double()


class OwnHead(Reward):
    """The teacher's mass on the student's likeliest tokens."""

    own_needs = Needs.STUDENT_TOPK
    student_top_k = 3

    def parts(self):
        return iter(())

    def __call__(self, reward_N: Tensor, tokens: Tokens, context: Context) -> Tensor:
        return reward_N + tokens.teacher_at_student_topk_NJ[:, : self.student_top_k].exp().sum(-1)


def test_an_objective_asks_for_the_likeliest_tokens_that_its_selectors_and_rewards_read():
    objective = Objective(Term("t", STUDENT & ~Head(), PolicyGradient(chain(LogRatio(), OwnHead()))))
    assert (objective.teacher_top_k, objective.student_top_k) == (7, 3)
    case = make_case(top_k=7)
    plan = objective.plan(case.tokens)
    mass_N = case.tokens.teacher_topk_logprobs_NK.exp().sum(-1)
    student_N = case.tokens.authors_N == S
    close((plan.weights["t"] > 0).to(F64), (student_N & (mass_N <= 0.5)).to(F64))


def test_likeliest_tokens_without_a_number_are_refused_by_name():
    class Careless(Head):
        teacher_top_k = 0

    objective = Objective(Term("careless", STUDENT & Careless(), NegativeLogLikelihood()))
    with pytest.raises(ConfigError, match=r"'careless'.*Needs\.TOPK.*teacher_top_k = 16"):
        _ = objective.teacher_top_k


def test_the_shortest_verified_answers_of_each_group_are_found_by_counting() -> None:
    lengths = (5, 2, 7, 3, 6, 4)
    case = make_case(lengths=lengths)
    tokens = case.tokens.with_(
        authors_N=torch.full_like(case.tokens.authors_N, int(Author.STUDENT)),
        num_actions_S=torch.tensor(lengths),
        rewards_S=torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]),
        groups_S=torch.tensor([4, 4, 4, 4, 9, 9]),
    )
    chosen_S = Shortest(0.5, among=Verified())(tokens, Context())[torch.tensor(lengths).cumsum(0) - 1]
    assert chosen_S.tolist() == [1, 0, 0, 1, 0, 1]  # 5 and 3 of (5, 7, 3); 4 alone


def test_answers_of_the_same_length_are_taken_together() -> None:
    case = make_case(lengths=(3, 3, 4))
    tokens = case.tokens.with_(num_actions_S=torch.tensor([3, 3, 4]), groups_S=torch.zeros(3, dtype=torch.int64))
    assert Shortest(0.1)(tokens, Context()).tolist() == [1.0] * 6 + [0.0] * 4


def test_a_group_without_a_verified_answer_has_no_shortest_one() -> None:
    case = make_case(lengths=(3, 2))
    tokens = case.tokens.with_(rewards_S=torch.zeros(2), groups_S=torch.zeros(2, dtype=torch.int64))
    assert not bool(Shortest(among=Verified())(tokens, Context()).any())
