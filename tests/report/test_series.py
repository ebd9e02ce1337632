from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.report.captions import say, say_change
from tropd.report.series import average, keep_extremes, pack, shorten


@settings(max_examples=50)
@given(seed=st.integers(0, 10**6), size=st.integers(1, 3000), width=st.integers(1, 4), limit=st.integers(20, 400))
def test_extremes_and_ends_of_every_column_stay(seed: int, size: int, width: int, limit: int) -> None:
    columns = list(np.random.default_rng(seed).standard_cauchy((width, size)))
    index = keep_extremes(columns, limit)
    assert len(index) <= max(limit, size if size <= limit else 2 * width + 2) + 2
    assert index[0] == 0 and index[-1] == size - 1
    for column in columns:
        assert column[index].min() == column.min() and column[index].max() == column.max()


def test_one_spike_in_a_hundred_thousand_steps_is_drawn() -> None:
    column = np.zeros(100_000)
    column[56_789] = 1e6
    column[12_345] = np.nan
    packed = pack(range(100_000), {"x": column}, 1000)
    assert len(packed["x"]) <= 1003
    assert packed["y"]["x"][packed["x"].index(56_789)] == 1e6
    assert None in packed["y"]["x"]


def test_a_line_is_broken_where_steps_are_missing() -> None:
    packed = pack([0, 1, 5, 6], {"a": np.array([1.0, 2.0, 3.0, np.inf])}, 100)
    assert packed == {"x": [0, 1, 3, 5, 6], "y": {"a": [1.0, 2.0, None, 3.0, None]}}


def test_few_numbers_are_all_shown() -> None:
    assert keep_extremes([np.arange(5.0)], 5).tolist() == [0, 1, 2, 3, 4]
    assert pack([], {"a": np.array([])}, 10) == {"x": [], "y": {"a": []}}


def test_averages_leave_out_what_is_not_finite() -> None:
    column = np.array([1.0, 3.0, np.nan, 5.0, np.nan, np.inf])
    assert shorten(average(column, 3)) == [2.0, 5.0, None]


def test_a_caption_tells_the_course_and_what_is_not_a_number() -> None:
    column = np.array([0.5, 0.9, 0.1, 0.6])
    assert say_change("trust", range(4), column, "share") == (
        "Trust: from 50 % to 60 %; least 10 % at step 2; most 90 % at step 1."
    )
    assert say_change("x", [7], np.array([-2.0]), "nats") == "X: −2."
    assert say_change("x", [0, 1], np.array([1.0, np.inf]), "nats") == "X: 1; infinite at 1 step."
    assert say_change("x", [0], np.array([np.nan]), "nats") == "X: no finite number."
    assert [say(0.12345, "share"), say(12345.6, "tokens"), say(0.5, "seconds")] == ["12.3 %", "12,346", "0.5 s"]
