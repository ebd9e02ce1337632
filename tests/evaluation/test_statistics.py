from itertools import combinations
from statistics import fmean

import pytest

from tropd.errors import ConfigError, DataError
from tropd.evaluation.statistics import bootstrap_interval, paired_difference, pass_at_k, probability_of_improvement


@pytest.mark.parametrize("num_correct", range(6))
@pytest.mark.parametrize("k", range(1, 6))
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_sample(num_correct: int, k: int) -> None:
    samples = [True] * num_correct + [False] * (5 - num_correct)
    subsets = [any(chosen) for chosen in combinations(samples, k)]
    assert pass_at_k(5, num_correct, k) == pytest.approx(fmean(subsets), abs=1e-15)


def test_pass_at_k_does_not_overflow() -> None:
    assert pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5, rel=1e-12)


def test_pass_at_k_of_more_samples_than_there_are_is_refused() -> None:
    with pytest.raises(ConfigError, match="pass@5 was asked, but there are 4 samples"):
        pass_at_k(4, 1, 5)
    with pytest.raises(ConfigError, match="5 correct samples out of 4"):
        pass_at_k(4, 5, 1)


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_interval(values)
    standard_error = 0.5 / 400**0.5
    assert low == pytest.approx(0.5 - 1.96 * standard_error, abs=0.008)
    assert high == pytest.approx(0.5 + 1.96 * standard_error, abs=0.008)


def test_bootstrap_interval_repeats_itself_and_widens_with_the_level() -> None:
    values = [0.1, 0.4, 0.9, 0.3, 0.7]
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    narrow, wide = bootstrap_interval(values, level=0.5), bootstrap_interval(values, level=0.99)
    assert wide[0] < narrow[0] < fmean(values) < narrow[1] < wide[1]


def test_bootstrap_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.random(60).tolist(), level=0.9, num_resamples=200)
        covered += low <= 0.5 <= high
    assert 0.82 <= covered / 200 <= 0.97


def test_an_interval_of_nothing_or_of_nan_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        bootstrap_interval([])
    with pytest.raises(DataError, match="nan at item 1"):
        bootstrap_interval([0.0, float("nan")])
    with pytest.raises(ConfigError, match="level 95"):
        bootstrap_interval([0.0, 1.0], level=95)


def test_pairing_finds_a_small_steady_gain_that_the_spread_of_items_hides() -> None:
    baseline = [i / 50 for i in range(50)]
    values = [b + 0.02 + 0.001 * (i % 3) for i, b in enumerate(baseline)]
    gain = paired_difference(values, baseline)
    assert gain.mean == pytest.approx(0.02 + 0.001 * fmean(i % 3 for i in range(50)))
    assert gain.excludes_zero and gain.low <= gain.mean <= gain.high and gain.num_items == 50
    low, _ = bootstrap_interval(values)
    _, high = bootstrap_interval(baseline)
    assert low < high  # the unpaired intervals overlap


def test_a_difference_of_different_items_is_refused() -> None:
    with pytest.raises(DataError, match="2 and 1 items"):
        paired_difference([1.0, 0.0], [1.0])


def test_probability_of_improvement_counts_ties_half() -> None:
    # task 1: pairs (1,0) win, (1,1) tie, (0,0) tie, (0,1) loss -> 0.5; task 2: always wins -> 1
    assert probability_of_improvement([[1, 0], [5]], [[0, 1], [3, 4]]) == pytest.approx(0.75)
    assert probability_of_improvement([[2.0, 2.0]], [[2.0]]) == 0.5
    with pytest.raises(DataError, match="2 tasks against 1"):
        probability_of_improvement([[1.0], [2.0]], [[1.0]])
