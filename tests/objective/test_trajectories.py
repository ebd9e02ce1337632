"""Which responses a filter keeps and how tokens are weighed by entropy, counted by hand."""

from __future__ import annotations

import pytest
import torch

from tests.objective.cases import F64, close, make_case
from tropd.methods import GNDPO, OPD, RGOPD, SCOPE, FiRe, TrOPD
from tropd.methods.fire import FiReWeights
from tropd.objective import Context, Tokens
from tropd.objective.examples import some_tokens
from tropd.objective.trajectories import BestResponses, EntropyWeight, TeacherLogprob
from tropd.types import Author

ZERO = -torch.inf


def responses(*means: float, length: int = 3) -> Tokens:
    """One response for each mean of log pi_T; its tokens scatter around the mean."""
    scatter = torch.tensor([-0.5, 0.0, 0.5] if length == 3 else [0.0] * length, dtype=F64)
    return some_tokens(
        teacher_logprobs_N=torch.cat([mean + scatter for mean in means]),
        sequences_N=torch.repeat_interleave(torch.arange(len(means)), length),
    )


def kept(tokens: Tokens, share: float) -> list[int]:
    weight_N = BestResponses(TeacherLogprob(), share)(tokens, Context())
    chosen = tokens.sequences_N[weight_N > 0].unique().tolist()
    assert all(bool((weight_N[tokens.sequences_N == s] == 1).all()) for s in chosen), "a response is kept whole"
    return chosen


@pytest.mark.parametrize(("number", "remain"), [(1, 1), (2, 2), (4, 4), (5, 4), (8, 7), (10, 8), (100, 80)])
def test_the_bottom_fifth_of_the_responses_is_left_out_rounded_down(number: int, remain: int) -> None:
    means = torch.randperm(number, generator=torch.Generator().manual_seed(0)).double() - number
    chosen = kept(responses(*means.tolist()), 0.8)
    assert chosen == sorted(means.argsort(descending=True)[:remain].tolist())


def test_a_long_response_is_compared_by_its_mean_and_not_by_its_sum() -> None:
    tokens = some_tokens(teacher_logprobs_N=[-1.0] * 6 + [-2.0, -1.5], sequences_N=[0] * 6 + [1, 2])
    assert kept(tokens, 0.3) == [0]


def test_equal_responses_at_the_cut_are_all_kept() -> None:
    assert kept(responses(-1.0, -2.0, -2.0, -2.0, -3.0), 0.4) == [0, 1, 2, 3]
    assert kept(responses(*[-0.1] * 5), 0.2) == [0, 1, 2, 3, 4]


def test_a_response_that_the_teacher_cannot_write_is_the_first_to_go() -> None:
    tokens = responses(-1.0, -9.0, -2.0, -3.0, -4.0)
    logprobs_N = tokens.teacher_logprobs_N.clone()
    logprobs_N[4 * 3] = ZERO
    assert kept(tokens.with_(teacher_logprobs_N=logprobs_N), 0.8) == [0, 1, 2, 3]


def test_what_the_teacher_wrote_counts_neither_for_a_mean_nor_as_a_response() -> None:
    authors = torch.tensor([2, 1, 2, 2, 1, 3])
    tokens = some_tokens(
        teacher_logprobs_N=[-9.0, -1.0, -0.1, -0.1, -2.0, -0.1], sequences_N=[0, 0, 1, 1, 2, 2], authors_N=authors
    )
    assert BestResponses(TeacherLogprob(), 0.5)(tokens, Context()).tolist() == [0, 1, 0, 0, 0, 0]
    alone = tokens.with_(authors_N=torch.full_like(authors, int(Author.TEACHER)))
    assert not BestResponses(TeacherLogprob(), 0.5)(alone, Context()).any()


def test_entropy_weights_are_the_papers_formula_with_mean_1() -> None:
    g = torch.Generator().manual_seed(0)
    teacher_N, student_N = torch.rand(2, 9, generator=g, dtype=F64)
    sequences_N = torch.tensor([0] * 4 + [1] * 5)
    tokens = some_tokens(teacher_entropy_N=teacher_N, student_entropy_N=student_N, sequences_N=sequences_N)
    groups = {"sequence": [sequences_N == 0, sequences_N == 1], "batch": [sequences_N >= 0]}
    for scope, parts in groups.items():
        found_N = EntropyWeight(sure=1.5, unsure=0.5, scope=scope)(tokens, Context())  # type: ignore[arg-type]
        for rows in parts:
            t, s = teacher_N[rows], student_N[rows]
            expected = (1 + 1.5 * (1 - t / t.max())) * (1 + 0.5 * s / s.max())
            close(found_N[rows], expected / expected.mean(), 1e-14)
    assert bool((EntropyWeight(0.0, 0.0)(tokens, Context()) == 1).all())


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_models_that_are_sure_everywhere_weigh_all_tokens_alike(scope) -> None:
    zeros = some_tokens(teacher_entropy_N=[0.0] * 3, student_entropy_N=[0.0] * 3, sequences_N=[0, 0, 1])
    assert EntropyWeight(scope=scope)(zeros, Context()).tolist() == [1.0, 1.0, 1.0]
    one = some_tokens(teacher_entropy_N=[0.7], student_entropy_N=[0.2])
    assert EntropyWeight(scope=scope)(one, Context()).tolist() == [1.0]


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_entropies_of_what_the_student_did_not_write_weigh_nothing_and_move_no_maximum(scope) -> None:
    case = make_case()
    other_N = case.tokens.authors_N != Author.STUDENT
    weight_N = EntropyWeight(scope=scope)(case.tokens, Context())
    assert not weight_N[other_N].any() and bool((weight_N[~other_N] > 0).all())
    high = {
        f"{who}_entropy_N": getattr(case.tokens, f"{who}_entropy_N") + 99 * other_N for who in ("teacher", "student")
    }
    assert torch.equal(EntropyWeight(scope=scope)(case.tokens.with_(**high), Context()), weight_N)


def test_fire_drops_what_is_least_likely_and_divides_by_the_weights_of_the_rest() -> None:
    case = make_case()
    weight_N = FiRe(drop=0.4).objective.plan(case.tokens).weights["reverse_kl"]
    close(weight_N.sum(), torch.tensor(1.0, dtype=F64), 1e-14)
    student_N = case.tokens.authors_N == Author.STUDENT
    means = {
        s: float(case.tokens.teacher_logprobs_N[student_N & (case.tokens.sequences_N == s)].mean())
        for s in case.tokens.sequences_N[student_N].unique().tolist()
    }
    assert len(means) == 5
    assert case.tokens.sequences_N[weight_N > 0].unique().tolist() == sorted(sorted(means, key=means.__getitem__)[2:])
    as_released = FiRe(preset="code", drop=0.4).objective
    assert torch.equal(as_released.plan(case.tokens).weights["reverse_kl"] > 0, student_N)
    assert as_released == FiRe(drop=0.0).objective


def test_fire_without_filter_and_entropies_is_opd_over_the_students_tokens() -> None:
    case = make_case()
    plain, opd = FiRe(drop=0.0, sure=0.0, unsure=0.0), OPD(ratio_clip=0.2)
    student = float((case.tokens.authors_N == Author.STUDENT).sum())
    actions = float(case.tokens.num_actions_S.sum())
    close(case.gradient(plain.objective) * student / actions, case.gradient(opd.objective), 1e-15)


def test_fire_on_another_method_weighs_the_students_tokens_alone() -> None:
    case = make_case()
    plain = TrOPD(top_k=4).objective.plan(case.tokens)
    weighed = TrOPD(top_k=4, plus=(FiReWeights(drop=0.4),)).objective.plan(case.tokens)
    own = FiReWeights(drop=0.4).selector(case.tokens, Context())
    for term in ("trusted", "outlier"):
        close(weighed.weights[term], plain.weights[term] * own, 1e-15)
    assert torch.equal(weighed.weights["guidance"], plain.weights["guidance"])


@pytest.mark.parametrize("preset", ["paper", "code"])
@pytest.mark.parametrize("seed", range(5))
def test_scope_weights_sum_to_the_groups_count_in_each_path(seed: int, preset) -> None:
    g = torch.Generator().manual_seed(seed)
    lengths = tuple(torch.randint(1, 9, (12,), generator=g).tolist())
    case = make_case(seed, lengths=lengths)
    tokens = case.tokens.with_(
        authors_N=torch.full_like(case.tokens.authors_N, int(Author.STUDENT)),
        num_actions_S=torch.tensor(lengths),
        rewards_S=torch.randint(2, (12,), generator=g).double(),
        groups_S=torch.arange(12) // 4,
    )
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.tensor(lengths).cumsum(0)[:-1]])
    for term in SCOPE(preset=preset, temperature=0.7).objective.terms:
        weight_S = term.where(tokens, Context())[firsts]
        right_S = (tokens.rewards_S > 0) == (term.name == "imitate")
        assert torch.equal(weight_S > 0, right_S)
        for group in range(3):
            members_S = right_S & (tokens.groups_S == group)
            assert float(weight_S[members_S].sum()) == pytest.approx(float(members_S.sum()), abs=1e-12)
            if int(members_S.sum()) == 1:
                assert weight_S[members_S].tolist() == [1.0]


def test_scope_favours_hard_won_successes_and_the_released_code_easy_ones() -> None:
    tokens = some_tokens(
        student_logprobs_N=[-1.0, -3.0, -1.0, -1.0],
        teacher_logprobs_N=[-1.0, -1.0, -0.5, -4.0],
        sequences_N=[0, 1, 2, 3],
        rewards_S=[1.0, 1.0, 0.0, 0.0],
        groups_S=[0, 0, 0, 0],
    )
    paper, code = (SCOPE(preset=preset).objective.plan(tokens).weights for preset in ("paper", "code"))
    assert paper["imitate"][0] < paper["imitate"][1] and code["imitate"][0] > code["imitate"][1]
    assert paper["distil"][2] > paper["distil"][3]
    close(paper["distil"], code["distil"])
    close(code["imitate"].sum(), torch.tensor(1.0), 1e-7)
    close(paper["imitate"].sum(), torch.tensor(2 / 4), 1e-7)


def test_scope_has_empty_paths_where_everybody_succeeds_or_fails() -> None:
    case = make_case()
    for reward, empty in ((1.0, "distil"), (0.0, "imitate")):
        rewards_S = torch.full_like(case.tokens.rewards_S, reward)
        for preset in ("paper", "code"):
            plan = SCOPE(preset=preset).objective.plan(case.tokens.with_(rewards_S=rewards_S))
            assert [name for name, weight_N in plan.weights.items() if not weight_N.any()] == [empty]


@pytest.mark.parametrize("method", [FiRe(), FiRe(scope="batch"), SCOPE(), RGOPD(), GNDPO()], ids=str)
@pytest.mark.parametrize("num_sequences", [0, 6])
def test_a_rank_without_a_token_plans_nothing(method, num_sequences: int) -> None:
    tokens = make_case().tokens.rows(slice(0, 0))
    per_sequence = ("keys_S", "num_actions_S", "rewards_S", "groups_S")
    tokens = tokens.with_(**{name: getattr(tokens, name)[:num_sequences] for name in per_sequence})
    assert all(len(weight_N) == 0 for weight_N in method.objective.plan(tokens).weights.values())
