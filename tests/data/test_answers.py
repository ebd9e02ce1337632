from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tropd.data.answers import final_text, last_boxed, normalize, read_choice, read_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("first 3, then 42.", 42),
        ("It costs $1,234,567.50 in all", Fraction("1234567.5")),
        ("1, 2, 3", 3),
        ("-7", -7),
        ("\u22127", -7),
        ("-$7", -7),
        ("from 3-4", 4),
        ("3/4 of it", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("2 1/2 cups", Fraction(5, 2)),
        (r"\frac{1}{3}", Fraction(1, 3)),
        (r"-\dfrac{1}{3}", Fraction(-1, 3)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        (r"$3.2 \times 10^{4}$", 32000),
        ("1.5e3", 1500),
        (".5", Fraction(1, 2)),
        ("so it is...5", 5),
        (r"1{,}000 and 1\,000", 1000),
        (r"in the box \boxed{12}, not 13", 12),
        (r"\boxed{none}, but 13", 13),
        ("x2 and H2O", None),
        ("1/0", None),
        ("no number", None),
        ("9" * 400, None),
    ],
)
def test_the_last_number_of_a_text(text: str, value: Fraction | int | None) -> None:
    found = read_number(text)
    assert (None if found is None else found.value) == value


@pytest.mark.parametrize("text", ["50%", r"50\%", "50 %", "50 percent"])
def test_a_percentage_is_told_from_a_number(text: str) -> None:
    found = read_number(text)
    assert found is not None and found.is_percent and found.value == 50


@settings(max_examples=100, deadline=None)
@given(st.text(), st.text(alphabet="0123456789.,/-%eE$ {}\\frac^x*()"))
def test_no_text_makes_a_reader_raise(anything: str, nearly: str) -> None:
    for text in (anything, nearly, anything + nearly):
        read_number(text)
        read_choice(final_text(text))
        last_boxed(text)
        normalize(text)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(-(10**15), 10**15) | st.decimals(-1000, 1000, places=3, allow_nan=False),
    st.text(alphabet="abc \n,;:!?$"),
)
def test_a_number_is_found_behind_any_words(number: object, words: str) -> None:
    for text in (f"{words} {number}", f"{words} {number}.", f"{words} {number} {words}", f"{words} ${number}$"):
        found = read_number(text)
        assert found is not None and found.value == Fraction(str(number))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**15))
def test_thousands_separators_do_not_change_a_number(number: int) -> None:
    assert read_number(f"about {number:,} of them") == read_number(str(number))


@pytest.mark.parametrize(
    "piece", ["9", "9,999", "\\frac{", "{", "answer ", "answer:", "####", "(", " ", "1 1/", "-", "A "]
)
def test_long_texts_are_read_in_linear_time(piece: str) -> None:
    """With quadratic time these 200 kB would take hours."""
    text = piece * (200_000 // len(piece))
    read_number(text)
    read_choice(text)
    final_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "(B)",
        "B.",
        "**B**",
        "The answer is B.",
        "The answer is (B)",
        "The correct answer is **B**: Paris",
        "Answer: B",
        "**Answer:** B",
        "### Answer\nB",
        "the answer would be option B",
        "The correct option is B",
        "Final answer: [B]",
        r"The answer is $\boxed{B}$.",
        r"\boxed{\text{B}}",
        r"\boxed{\textbf{(B)} 12}",
        r"The answer is \(B\)",
        "I choose B",
        "I'd go with option B.",
        "B is the correct answer",
        "Option B is correct.",
        "B. Paris",
        "(B) Paris",
        "A good question: Paris is the capital.\n\nB) Paris",
        "The answer is A. No, wait: the answer is B",
        "The answer is B because option C is too small",
        "A and C are out.\nB",
        "It can only be (B), I think",
        "The answer is B, I think.",
        "答案是B",
        "答案：B",
        "选B",
    ],
)
def test_a_letter_is_read_in_many_phrasings(text: str) -> None:
    assert read_choice(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A good question.",
        "I think that Paris is the capital",
        "The answer is A or B",
        "The answer is A, B and C",
        r"\boxed{A, B}",
        "The answer is a fish",
        "The answer is I think unclear",
        "The answer isn't B",
        "A. London\nB. Paris",
        "(A) or (B)",
        "K",
        "The answer is Beijing",
    ],
)
def test_no_letter_or_several_are_no_choice(text: str) -> None:
    assert read_choice(text) is None


def test_thinking_is_not_the_answer() -> None:
    assert final_text("<think>maybe 3</think>\n4") == "4"
    assert final_text("maybe 3</think>4") == "4", "the template may have opened the thought"
    assert final_text("<think>maybe 3") == ""


def test_a_last_line_after_four_hashes_is_the_answer() -> None:
    assert final_text("3 + 4 = 7 and 7 - 1 = 6\n#### 6") == "6"
    assert final_text("#### Steps\n1. add\n2. It is 7") == "#### Steps\n1. add\n2. It is 7"


def test_a_box_ends_where_its_braces_close() -> None:
    assert last_boxed(r"\boxed{1} or \boxed{\frac{1}{2}} then {}") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{\frac{1}{2}") is None
    assert last_boxed("no box") is None


def test_texts_that_read_the_same_are_normalized_to_the_same() -> None:
    assert normalize("  The\tEiffel\nTower. ") == normalize("the eiffel tower") == normalize("ＴＨＥ Eiffel Tower!")
    assert normalize("!") != normalize("?"), "punctuation alone is a text"
