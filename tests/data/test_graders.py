from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import byte_tokenizer
from tropd.data.graders import (
    GRADERS,
    Grade,
    Grader,
    Math,
    Numeric,
    check_answers,
    exact,
    grade_texts,
    graded,
    resolve_grader,
)
from tropd.errors import DataError
from tropd.types import Author, Prompt, Rollout

COMPARING = [name for name in GRADERS if name != "gym"]  # which asks the generator's entry
numeric, math, multiple_choice = GRADERS["numeric"], GRADERS["math"], GRADERS["multiple_choice"]


def one(grader: Grader, completion: Any, answer: str) -> float:
    (score,) = grader(["?"], [completion], answer=[answer])
    return score


def rollout(prompt: str, response: str, answer: str | None = None, **columns: Any) -> Rollout:
    tokenizer = byte_tokenizer()
    before, after = tuple(tokenizer.encode(prompt)), tuple(tokenizer.encode(response))
    return Rollout(
        id=prompt,
        prompt=Prompt(id=prompt, token_ids=before, answer=answer, columns=columns),
        token_ids=before + after,
        authors=(Author.CONTEXT,) * len(before) + (Author.STUDENT,) * len(after),
        behavior_logprobs=(0.0,) * len(before + after),
    )


def rewards(grader: Grader, rollouts: Sequence[Rollout]) -> list[float | None]:
    return [each.reward for each in graded(grader, rollouts, byte_tokenizer())]


def repeat_columns(prompts: Sequence[str], completions: Sequence[str], level: Sequence[int], **_: Any) -> list[float]:
    """A grader of somebody else's, for resolve_grader."""
    return [float(value) for value in level]


def takes_no_columns(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [0.0 for _ in completions]


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (" Paris.", "paris", 1),
        ("<think>Rome?</think>Paris", "Paris", 1),
        ("Paris, I think", "Paris", 0),
        ("", "Paris", 0),
    ],
)
def test_exact_compares_the_normalized_text(completion: str, answer: str, score: float) -> None:
    assert one(exact, completion, answer) == score


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so 1,000 dollars", "1000", 1),
        ("0.5", "1/2", 1),
        ("0.33333333", "1/3", 1),
        ("0.333", "1/3", 0),
        ("10000001", "10000000", 0),
        ("50%", "0.5", 1),
        ("50", "50%", 1),
        ("0.5", "50%", 1),
        ("50%", "0.5%", 0),
        ("5000", "50%", 0),
        ("72", "48/2 = 24\n48 + 24 = 72\n#### 72", 1),
        ("no idea", "72", 0),
        ("0", "0.0", 1),
    ],
)
def test_numeric_compares_the_last_number(completion: str, answer: str, score: float) -> None:
    assert one(numeric, completion, answer) == score


def test_the_tolerance_of_numeric_is_a_knob() -> None:
    assert one(Numeric(tolerance=1e-2), "0.333", "1/3") == 1
    assert one(Numeric(tolerance=1e-2), "1001", "1000") == 0, "integers are compared exactly"


@settings(max_examples=100, deadline=None)
@given(st.text() | st.text(alphabet="0123456789.,/-%eE \\{}"), st.integers(-(10**9), 10**9))
def test_numeric_scores_any_text_and_knows_its_own_answer(garbage: str, number: int) -> None:
    assert one(numeric, garbage, str(number)) in (0.0, 1.0)
    assert one(numeric, f"{garbage} so {number}", str(number)) == 1.0 or "boxed" in garbage or "<think>" in garbage
    assert one(numeric, f"so {number}", str(number + 1)) == 0.0


def test_multiple_choice_compares_letters() -> None:
    for answer in ("B", "b", "(B)", "B. Paris"):
        assert one(multiple_choice, "The answer is (B)", answer) == 1
        assert one(multiple_choice, "The answer is (C)", answer) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"so $\frac{1}{2}$", "0.5", 1),
        (r"\boxed{1 + x^2}", "$x^2+1$", 1),
        (r"\boxed{x^2 + 1}", "x^2+1", 1),
        (r"\boxed{\{2, 1\}}", r"\{1, 2\}", 1),
        (r"\boxed{(1, 2)}", "(1,2)", 1),
        (r"\boxed{(2, 1)}", "(1,2)", 0),
        ("The answer is 72.", "3 + 69 = 72\n#### 72", 1),
        (r"\boxed{Evelyn}", "Evelyn", 1),
        (r"\boxed{3}", "4", 0),
        ("\x00 \udcff \\boxed{\\frac{}}{{{ $$$", "5", 0),
        ("\\left(" * 500, "5", 0),
        ("", "5", 0),
    ],
)
def test_math_compares_values_and_never_raises(completion: str, answer: str, score: float) -> None:
    assert one(math, completion, answer) == score


def test_an_expression_that_takes_for_ever_scores_zero_with_a_warning_and_the_next_is_graded() -> None:
    grader = Math(seconds=1.0)
    with pytest.warns(RuntimeWarning, match="Scored 0"):
        assert one(grader, r"\boxed{9^{9^{9^{9}}}}", "5") == 0
    grader.process.seconds = 60.0
    assert one(grader, r"\boxed{\frac{10}{2}}", "5") == 1
    grader.close()


def test_an_expression_that_takes_all_memory_scores_zero_and_the_next_is_graded() -> None:
    grader = Math(seconds=60.0, memory=2**26)
    assert one(grader, r"\boxed{2^{2^{31}}}", "5") == 0  # a number of 256 MB
    worker = grader.process._worker
    assert worker is not None and worker.poll() is None
    limits = Path(f"/proc/{worker.pid}/limits").read_text()
    (space,) = (line.split() for line in limits.splitlines() if line.startswith("Max address space"))
    assert int(space[3]) < 2**33
    assert one(grader, r"\boxed{\frac{10}{2}}", "5") == 1
    grader.close()


def test_math_answers_every_thread_its_own_question() -> None:
    """Half of the threads are always right and half never: an answer that goes astray shows."""
    start, num_questions = threading.Barrier(8), 25
    scores: dict[int, list[float]] = {}

    def ask(thread: int) -> None:
        said, answers = [r"$\frac{8}{2}$"] * num_questions, [str(4 + thread % 2)] * num_questions
        start.wait()
        scores[thread] = math(["?"] * num_questions, said, answer=answers)

    threads = [threading.Thread(target=ask, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == {thread: [1.0 - thread % 2] * num_questions for thread in range(8)}


@pytest.mark.parametrize("name", COMPARING)
def test_every_grader_reads_conversations(name: str) -> None:
    conversation = [
        {"role": "user", "content": "no"},
        {"role": "assistant", "content": "B" if "choice" in name else "4"},
    ]
    assert one(GRADERS[name], conversation, "B" if "choice" in name else "4") == 1


@pytest.mark.parametrize("name", COMPARING)
def test_no_answer_is_an_error_that_names_the_grader(name: str) -> None:
    for columns in ({}, {"answer": [None]}, {"answer": [""]}):
        with pytest.raises(DataError, match=f"grader '{name}' .*data.answer_column"):
            GRADERS[name](["?"], ["4"], **columns)


def test_an_answer_that_a_grader_cannot_read_is_an_error() -> None:
    with pytest.raises(DataError, match="'numeric' finds no number in the answer 'four'"):
        one(numeric, "4", "four")
    with pytest.raises(DataError, match="'multiple_choice' finds no letter A-J in the answer '2'"):
        one(multiple_choice, "B", "2")


def test_a_grader_is_found_by_name_and_by_path() -> None:
    for name, grader in GRADERS.items():
        assert resolve_grader(name) is grader
    assert resolve_grader("tests.data.test_graders:repeat_columns") is repeat_columns


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("numerik", "did you mean 'numeric'.*there are exact, numeric"),
        ("no.such.module:f", r"no\.such\.module cannot be imported"),
        ("tests.data.test_graders:repeat_column", "did you mean 'repeat_columns'"),
        ("tests.data.test_graders:takes_no_columns", r"takes no \*\*columns"),
    ],
)
def test_a_grader_that_cannot_be_used_is_explained(name: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        resolve_grader(name)


def test_grade_reads_the_response_alone_and_without_special_tokens() -> None:
    seen: dict[str, Any] = {}

    def watch(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        seen.update(columns, prompts=prompts, completions=completions)
        return [0.25, True]

    rollouts = [rollout("<|user|>1+1", "2<|end|><|eos|>", "2", level=1), rollout("3+3", "6", None, kind="sum")]
    assert rewards(watch, rollouts) == [0.25, 1.0]
    assert seen == {
        "prompts": ["<|user|>1+1", "3+3"],
        "completions": ["2", "6"],
        "answer": ["2", None],
        "level": [1, None],
        "kind": [None, "sum"],
    }


def test_grade_hands_columns_to_a_grader_of_somebody_elses() -> None:
    rollouts = [rollout("a", "b", level=3), rollout("c", "d", level=4)]
    assert rewards(resolve_grader("tests.data.test_graders:repeat_columns"), rollouts) == [3.0, 4.0]
    assert rewards(repeat_columns, []) == []


@pytest.mark.parametrize(
    ("result", "says"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        (None, "returned a NoneType"),
        ([1.0, None], "scored an answer to 'c' None"),
        ([float("nan"), 1.0], "scored an answer to 'a' nan"),
        ([1.0, float("inf")], "'c' inf"),
        ([1.0, "1"], "'c' '1'"),
    ],
)
def test_scores_that_are_no_numbers_are_refused_with_the_graders_name(result: Any, says: str) -> None:
    def broken(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        return result

    with pytest.raises(DataError, match=f"grader 'broken' .*{says}"):
        rewards(broken, [rollout("a", "b"), rollout("c", "d")])


def test_an_error_inside_a_grader_says_whose_it_is() -> None:
    with pytest.raises(TypeError) as caught:
        rewards(repeat_columns, [rollout("a", "b")])
    assert caught.value.__notes__ == ["raised by grader 'repeat_columns'"]


def test_answers_that_a_grader_rejects_are_found_before_the_run() -> None:
    prompts = [Prompt(id=str(number), token_ids=(1,), answer=f"#### {number}") for number in range(500)]
    check_answers(numeric, prompts, byte_tokenizer())
    with pytest.raises(DataError, match="'numeric' finds no number in the answer 'four'"):
        check_answers(numeric, [*prompts[:9], Prompt(id="x", token_ids=(1,), answer="four")], byte_tokenizer())
    with pytest.raises(DataError, match="grader 'zero' gives 200 of 200 answers less than 1.*first prompt '0'"):
        check_answers(zero, prompts, byte_tokenizer())


def zero(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_texts_are_graded_like_rollouts() -> None:
    prompt = Prompt(id="a", token_ids=(1,), answer="4")
    assert grade_texts(numeric, [prompt, prompt], ["it is 4", "it is 5"], byte_tokenizer()) == [1.0, 0.0]


def says(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float | Grade]:
    """Some graders give words, for some answers."""
    return [Grade(reward=0.5, words=f"{text} is close") if text else 0 for text in completions]


def test_a_grader_may_give_words_and_those_of_tropd_say_whether_an_answer_is_right() -> None:
    found = graded(says, [rollout("a", "b"), rollout("a", "")], byte_tokenizer())
    assert [(r.reward, r.feedback) for r in found] == [(0.5, "b is close"), (0.0, None)]
    assert grade_texts(says, [found[0].prompt], ["c"], byte_tokenizer()) == [0.5]
    pairs = [rollout("1+1", "2", "2"), rollout("1+1", "3", "2")]
    words = [r.feedback for r in graded(exact, pairs, byte_tokenizer())]
    assert words == ["The answer is right.", "The answer is wrong."] and "2" not in "".join(map(str, words))
    partly = Grade(reward=1.0, words=7)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="said 7 of an answer to 'a'. Say a text"):
        rewards(lambda prompts, completions, **_: [partly], [rollout("a", "b")])
