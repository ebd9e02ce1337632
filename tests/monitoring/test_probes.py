from itertools import pairwise
from math import exp, log
from typing import Any

import pytest
import torch

from tropd.monitoring.probes import Sums, probe_batch, repeated_share
from tropd.objective.context import Alone
from tropd.objective.evidence import Tokens
from tropd.types import Author, Finish, Prompt, Rollout, Sampling

S, T = Author.STUDENT, Author.TEACHER


def make_tokens(authors: list[Author], sequences: list[int], **evidence: Any) -> Tokens:
    sequences_N = torch.tensor(sequences)
    counts_S = torch.bincount(sequences_N)
    positions = [sequences[:n].count(s) for n, s in enumerate(sequences)]
    return Tokens(
        token_ids_N=torch.arange(len(authors)),
        authors_N=torch.tensor([int(a) for a in authors]),
        sequences_N=sequences_N,
        positions_N=torch.tensor(positions),
        keys_S=torch.arange(len(counts_S)),
        num_actions_S=counts_S,
        **evidence,
    )


def rollout(response: tuple[int, ...], finish: Finish = Finish.STOP) -> Rollout:
    return Rollout(
        id="r",
        prompt=Prompt(id="p", token_ids=(7, 8)),
        token_ids=(7, 8, *response),
        authors=(Author.CONTEXT,) * 2 + (S,) * len(response),
        behavior_logprobs=(0.0,) * (2 + len(response)),
        finish=finish,
    )


def probes_of(tokens: Tokens, **options: Any) -> dict[str, float]:
    return probe_batch(tokens, [], **options).result()


def test_trust_and_ratio_by_hand_on_student_tokens_only() -> None:
    teacher = torch.tensor([0.2, 0.5, 0.001, 0.9]).log()
    student = torch.tensor([0.4, 0.25, 0.5, 0.1]).log()
    tokens = make_tokens([S, S, S, T], [0, 0, 0, 0], teacher_logprobs_N=teacher, student_logprobs_N=student)
    probes = probes_of(tokens)
    x = [log(0.5), log(2.0), log(0.002)]
    assert probes["trust/share"] == pytest.approx((0.5 + 1.0 + 0.002) / 3)
    assert probes["trust/tv"] == pytest.approx(1 - (0.5 + 1.0 + 0.002) / 3)
    assert probes["ratio/mean"] == pytest.approx(sum(x) / 3, rel=1e-6)
    assert probes["ratio/min"] == pytest.approx(x[2], rel=1e-6) and probes["ratio/max"] == pytest.approx(x[1], rel=1e-6)
    assert probes["ratio/below_-5"] == pytest.approx(1 / 3) and probes["ratio/infinite"] == 0.0
    assert probes["ratio/p01"] == -6.21 and probes["ratio/p50"] == -0.69 and probes["ratio/p99"] == 0.69
    assert probes["teacher/mean_logprob"] == pytest.approx((log(0.2) + log(0.5) + log(0.001)) / 3, rel=1e-6)
    assert probes["teacher/min_logprob"] == pytest.approx(log(0.001), rel=1e-6)
    assert probes["teacher/max_logprob"] == pytest.approx(log(0.5), rel=1e-6)


def test_expected_trust_share_is_one_minus_the_total_variation() -> None:
    teacher = torch.tensor([0.7, 0.2, 0.1])
    student = torch.tensor([0.3, 0.3, 0.4])
    # each token as often as the student writes it: 3, 3 and 4 times in 10
    written = torch.tensor([0] * 3 + [1] * 3 + [2] * 4)
    evidence = dict(teacher_logprobs_N=teacher.log()[written], student_logprobs_N=student.log()[written])
    probes = probes_of(make_tokens([S] * 10, [0] * 10, **evidence))
    assert probes["trust/tv"] == pytest.approx(float((teacher - student).abs().sum()) / 2, rel=1e-6)


def test_quantiles_agree_with_exact_ones_to_half_a_bin() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 - 1
    student = torch.full_like(x, -9.0)
    tokens = make_tokens([S] * 5000, [0] * 5000, teacher_logprobs_N=student + x, student_logprobs_N=student)
    probes = probes_of(tokens)
    for name, q in (("p01", 0.01), ("p05", 0.05), ("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        exact = float(torch.quantile(x, q, interpolation="lower"))
        assert probes[f"ratio/{name}"] == pytest.approx(exact, abs=0.02)


def test_identical_models_give_exact_zeros() -> None:
    same = torch.tensor([-0.3, -5.0, -1.25])
    probes = probes_of(make_tokens([S] * 3, [0] * 3, teacher_logprobs_N=same, student_logprobs_N=same))
    assert probes["trust/share"] == 1.0 and probes["trust/tv"] == 0.0
    assert {probes[f"ratio/{p}"] for p in ("mean", "min", "max", "p01", "p05", "p50", "p95", "p99")} == {0.0}


def test_a_token_the_teacher_forbids_is_distrusted_and_counted_but_does_not_spoil_the_mean() -> None:
    teacher = torch.tensor([-torch.inf, -1.0])
    tokens = make_tokens([S, S], [0, 0], teacher_logprobs_N=teacher, student_logprobs_N=torch.tensor([-1.0, -1.5]))
    probes = probes_of(tokens)
    assert probes["trust/share"] == 0.5 and probes["ratio/infinite"] == 0.5
    assert probes["ratio/mean"] == probes["ratio/min"] == 0.5 and probes["ratio/p01"] == -40.0


def test_nan_is_shown_not_dropped() -> None:
    teacher = torch.tensor([float("nan"), -1.0])
    tokens = make_tokens([S, S], [0, 0], teacher_logprobs_N=teacher, student_logprobs_N=torch.tensor([-1.0, -1.5]))
    probes = probes_of(tokens)
    assert probes["ratio/mean"] != probes["ratio/mean"] and probes["trust/share"] != probes["trust/share"]


def test_positions_are_parts_of_each_answers_own_length() -> None:
    # answers of 4 and 2 tokens, two parts: tokens 0, 1 | 2, 3 and 4 | 5
    x = torch.tensor([0.0, -1.0, -2.0, -3.0, 1.0, -5.0])
    student = torch.full((6,), -6.0)
    tokens = make_tokens([S] * 6, [0, 0, 0, 0, 1, 1], teacher_logprobs_N=student + x, student_logprobs_N=student)
    probes = probes_of(tokens, bins=2)
    assert probes["position/0/ratio"] == pytest.approx((0 - 1 + 1) / 3)
    assert probes["position/1/ratio"] == pytest.approx((-2 - 3 - 5) / 3)
    assert probes["position/0/tv"] == pytest.approx(1 - (1 + exp(-1) + 1) / 3)
    assert probes["position/1/tv"] == pytest.approx(1 - (exp(-2) + exp(-3) + exp(-5)) / 3)


def test_overlap_and_masses_by_hand() -> None:
    tokens = make_tokens(
        [S, S, T],
        [0, 0, 0],
        teacher_topk_ids_NK=torch.tensor([[5, 1, 9], [2, 3, 4], [0, 1, 2]]),
        student_topk_ids_NJ=torch.tensor([[1, 5], [7, 8], [0, 1]]),
        teacher_at_student_topk_NJ=torch.tensor([[0.2, 0.5], [0.01, 0.02], [1.0, 1.0]]).log(),
    )
    at_teachers = torch.tensor([[0.3, 0.4, 0.1], [0.05, 0.05, 0.0], [1.0, 1.0, 1.0]]).log()
    probes = probes_of(tokens, topk_logprobs_NK=at_teachers)
    assert probes["overlap/top_k"] == pytest.approx((2 / 2 + 0 / 2) / 2)
    assert probes["mass/teacher_in_student_top_k"] == pytest.approx((0.7 + 0.03) / 2)
    assert probes["mass/student_in_teacher_top_k"] == pytest.approx((0.8 + 0.1) / 2)


def test_entropies_and_their_gap_by_hand() -> None:
    evidence = dict(teacher_entropy_N=torch.tensor([1.0, 2.0, 9.0]), student_entropy_N=torch.tensor([2.0, 0.5, 9.0]))
    probes = probes_of(make_tokens([S, S, T], [0, 0, 0], **evidence))
    assert (probes["entropy/teacher"], probes["entropy/student"], probes["entropy/gap"]) == (1.5, 1.25, 1.25)


def test_mismatch_is_measured_only_where_the_sampler_is_the_model() -> None:
    evidence = dict(
        behavior_logprobs_N=torch.tensor([-1.0, -2.5, 0.0]), student_logprobs_N=torch.tensor([-1.25, -2.0, -7.0])
    )
    tokens = make_tokens([S, S, T], [0, 0, 0], **evidence)
    probes = probes_of(tokens)
    assert probes["mismatch/behavior"] == pytest.approx(0.375) and probes["mismatch/behavior_max"] == 0.5
    for sampling in (Sampling(top_p=0.9), Sampling(top_k=5), Sampling(temperature=0.7)):
        assert "mismatch/behavior" not in probes_of(tokens, sampling=sampling)


def test_rollouts_lengths_truncation_and_repetition_by_hand() -> None:
    rollouts = [rollout((1, 2, 3, 4, 1, 2, 3, 4), Finish.LENGTH), rollout((1, 2, 3, 4, 5)), rollout((1,))]
    probes = probe_batch(make_tokens([T], [0]), rollouts).result()
    assert probes["length/mean"] == pytest.approx((8 + 5 + 1) / 3) and probes["length/max"] == 8
    assert probes["finish/truncated"] == pytest.approx(1 / 3)
    # 1234 2341 3412 4123 1234: one of five is repeated; the second answer has none; the third is too short
    assert probes["repetition/4gram"] == pytest.approx((1 / 5 + 0) / 2)
    assert repeated_share([9] * 103) == pytest.approx(0.99) and repeated_share([1, 2, 3]) == 0.0


def test_without_evidence_there_are_no_numbers() -> None:
    assert probes_of(make_tokens([S, S], [0, 0])) == {}
    evidence = dict(teacher_logprobs_N=torch.tensor([-1.0]), student_logprobs_N=torch.tensor([-1.0]))
    assert probes_of(make_tokens([T], [0], **evidence)) == {}


def random_batch(num: int) -> tuple[Tokens, torch.Tensor, list[Rollout]]:
    rng = torch.Generator().manual_seed(1)
    rand = lambda *shape: torch.rand(*shape, generator=rng)  # noqa: E731
    ids = torch.stack([torch.randperm(20, generator=rng)[:8] for _ in range(num)])
    tokens = make_tokens(
        [S if x < 0.8 else T for x in rand(num).tolist()],
        sorted((rand(num) * 5).long().tolist()),
        teacher_logprobs_N=rand(num).log() * 4,
        student_logprobs_N=rand(num).log(),
        behavior_logprobs_N=rand(num).log(),
        teacher_topk_ids_NK=ids[:, :4],
        student_topk_ids_NJ=ids.roll(1, 0)[:, :4],
        teacher_at_student_topk_NJ=rand(num, 4).log(),
        teacher_entropy_N=rand(num),
        student_entropy_N=rand(num),
    )
    answers = [tuple((rand(12) * 3).long().tolist()) for _ in range(5)]
    return tokens, rand(num, 4).log(), [rollout(answer) for answer in answers]


@pytest.mark.parametrize("cuts", [[0, 60], [0, 1, 60], [0, 13, 13, 14, 41, 60], list(range(61))])
def test_any_cut_of_rows_and_rollouts_adds_up(cuts: list[int]) -> None:
    tokens, at_teachers, rollouts = random_batch(60)
    whole = probe_batch(tokens, rollouts, topk_logprobs_NK=at_teachers).result()
    total = Sums.nothing()
    for i, (start, stop) in enumerate(pairwise(cuts)):
        rows = slice(start, stop)
        mine = rollouts[i : i + 1] if i < len(cuts) - 2 else rollouts[i:]
        total = total + probe_batch(tokens.rows(rows), mine, topk_logprobs_NK=at_teachers[rows])
    assert len(whole) > 35
    assert total.result() == pytest.approx(whole, rel=1e-12)


class TwoRanks:
    """The other rank holds fixed rows."""

    def __init__(self, other: torch.Tensor) -> None:
        self.other = other

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.other])


class Catch:
    def __init__(self) -> None:
        self.seen = torch.empty(0)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        self.seen = x
        return x


def test_ranks_add_up_even_when_one_has_nothing() -> None:
    tokens, at_teachers, rollouts = random_batch(60)
    mine = probe_batch(tokens, rollouts, topk_logprobs_NK=at_teachers)
    catch = Catch()
    Sums.nothing().gather(catch)
    assert mine.gather(Alone()).result() == mine.result()
    assert mine.gather(TwoRanks(catch.seen)).result() == mine.result()
    assert mine.gather(TwoRanks(_packed(mine))).result() == pytest.approx((mine + mine).result())


def _packed(sums: Sums) -> torch.Tensor:
    catch = Catch()
    sums.gather(catch)
    return catch.seen


def test_what_is_filled_in_for_responses_that_the_teacher_did_not_read_enters_no_probe() -> None:
    g = torch.Generator().manual_seed(2)
    authors, sequences = [S] * 9, [0, 0, 0, 1, 1, 1, 1, 2, 2]

    def evidence(filled: float) -> dict[str, torch.Tensor]:
        g.manual_seed(2)
        said = torch.randn(9, 6, generator=g).log_softmax(-1)
        own = torch.randn(9, 6, generator=g).log_softmax(-1)
        said[3:7] = filled
        top = said.topk(3)
        return {
            "teacher_logprobs_N": said[:, 0],
            "teacher_topk_ids_NK": top.indices,
            "teacher_topk_logprobs_NK": top.values,
            "teacher_at_student_topk_NJ": said[:, :2],
            "student_topk_ids_NJ": own.topk(2).indices,
            "teacher_entropy_N": -said[:, 1],
            "student_entropy_N": -own[:, 1],
            "student_logprobs_N": own[:, 2],
            "behavior_logprobs_N": own[:, 3],
        }

    read_S = torch.tensor([True, False, True])
    at_teacher = torch.randn(9, 3, generator=g).log_softmax(-1)
    whole = [
        probes_of(make_tokens(authors, sequences, read_S=read_S, **evidence(x)), topk_logprobs_NK=at_teacher)
        for x in (0.0, -77.0)
    ]
    kept = torch.tensor([0, 1, 2, 7, 8])
    parts = make_tokens(authors, sequences, **evidence(0.0)).rows(kept)
    alone = probes_of(parts, topk_logprobs_NK=at_teacher[kept])
    everybody = {"entropy/student", "mismatch/behavior", "mismatch/behavior_max"}
    assert whole[0] == whole[1] and whole[0].keys() == alone.keys() and len(alone) > 20
    assert {n: x for n, x in whole[0].items() if n not in everybody} == {
        n: x for n, x in alone.items() if n not in everybody
    }
    assert whole[0]["entropy/student"] != alone["entropy/student"], "the student is probed on all of its own tokens"
