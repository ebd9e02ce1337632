"""The chain's texts are right where they say so, and wrong where a style asks for it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tropd.config.models import ModelConfig
from tropd.data.chat import encode_plain
from tropd.data.graders import resolve_grader
from tropd.model.loading import load_tokenizer
from tropd.testbeds.chain import Chain, ChainStyle
from tropd.testbeds.task import Problem
from tropd.testbeds.tokenizer import make_tokenizer, num_rows

CHAIN = Chain(modulus=5, operations=(2, 4))
PROBLEM = Problem(question=tuple("4+4-1?"), answer=("#", "2"), givens=([4, 4, 1], ["+", "-"]))


def written(style: ChainStyle, seed: int = 0) -> str:
    return "".join(word for word, _ in CHAIN.write(random.Random(seed), PROBLEM, style))


def test_a_text_goes_from_left_to_right() -> None:
    assert written(ChainStyle(bar=0.0)) == "4+4=3;3-1=2;#2"
    assert written(ChainStyle(bar=1.0)) == "4+4=3|3-1=2|#2"
    assert written(ChainStyle(terse=True)) == "3,2,#2"


@pytest.mark.parametrize("style", [ChainStyle(), ChainStyle(terse=True)])
def test_every_honest_text_is_graded_right_and_every_answer_grades_itself(style: ChainStyle) -> None:
    rng, grader = random.Random(1), resolve_grader("chain")
    problems = [CHAIN.problem(rng) for _ in range(50)]
    texts = ["".join(word for word, _ in CHAIN.write(rng, problem, style)) for problem in problems]
    answers = ["".join(problem.answer) for problem in problems]
    assert grader([""] * 50, texts, answer=answers) == [1.0] * 50
    assert grader([""] * 50, answers, answer=answers) == [1.0] * 50
    for text, problem, answer in zip(texts, problems, answers, strict=True):
        numbers = "".join(problem.question[:-1])
        assert text.endswith(answer) and answer == f"#{eval(numbers) % 5}"


def test_a_wrong_or_missing_ending_is_graded_wrong() -> None:
    grader = resolve_grader("chain")
    assert grader([""] * 4, ["4+4=3;#3", "4+4=3;#", "", "#2;"], answer=["#2"] * 4) == [0.0] * 4


def test_noise_is_learnt_and_a_corruption_is_not_and_the_text_goes_on_from_either() -> None:
    rng = random.Random(2)
    noisy = [CHAIN.write(rng, PROBLEM, ChainStyle(noise=1.0)) for _ in range(50)]
    corrupt = [CHAIN.write(rng, PROBLEM, ChainStyle(corrupt=1.0)) for _ in range(50)]
    assert all(learnt for text in noisy for _, learnt in text)
    for text in noisy + corrupt:
        words = [word for word, _ in text]
        assert words[4] == words[6] and words[10] == words[-1]  # each result is where the next part begins
    for text in corrupt:
        assert [n for n, (_, learnt) in enumerate(text) if not learnt] == [4, 10]
    assert len({text[-1][0] for text in noisy}) == len({text[-1][0] for text in corrupt}) == 5


def test_the_tokenizer_gives_back_every_text_and_begins_prompts_once(tmp_path: Path) -> None:
    make_tokenizer(CHAIN).save_pretrained(tmp_path)
    tokenizer = load_tokenizer(ModelConfig(path=str(tmp_path)), "student")
    text = "".join(CHAIN.words)
    ids = encode_plain(text, tokenizer)
    assert ids[0] == tokenizer.bos_token_id and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(list(ids), skip_special_tokens=True) == text
    assert len(ids) == 1 + len(text) and max(ids) < len(tokenizer) <= num_rows(CHAIN) == 32
    assert tokenizer.eos_token_id is not None and not tokenizer.chat_template
