"""Two cuts of one text: chunks are its shortest common pieces, and credit keeps their sums."""

import copy
import random
from itertools import product
from typing import Any, Literal

import pytest
import torch
from tokenizers import normalizers

from tests.bridge.kinds import KINDS, LINES, tokenizer_of
from tropd.bridge.chunks import Chunk, chunks_of, credited, is_read
from tropd.bridge.spelling import decode, encoded, spelled

PAIRS = [*product(KINDS, KINDS)]


def texts(seed: int, number: int):
    """Texts with emoji, combining marks, several scripts, code, spaces and control characters."""
    draw = random.Random(seed)
    for _ in range(number):
        pieces = (draw.choice((*LINES, "\x00\x07", " " * 9, "\u200f")) for _ in range(draw.randrange(1, 6)))
        yield "".join(piece[draw.randrange(9) :][: draw.randrange(1, 30)] for piece in pieces)


def responses(kind: str, seed: int, number: int):
    """What a student may draw: texts as its tokenizer cuts them, and arbitrary tokens, broken characters among them."""
    draw, tokenizer = random.Random(seed), tokenizer_of(kind)
    plain = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]
    for text in texts(seed, number):
        yield tokenizer.encode(text, add_special_tokens=False)
        yield [draw.choice(plain) for _ in range(draw.randrange(1, 25))]


@pytest.mark.parametrize("number", [12, pytest.param(200, marks=pytest.mark.slow)])  # 10,000 texts over all pairs
@pytest.mark.parametrize(("own", "theirs"), PAIRS)
def test_chunks_cover_the_text_in_order_and_keep_every_sum(own: str, theirs: str, number: int) -> None:
    for n, ids in enumerate(responses(own, 1, number)):
        student = spelled(tokenizer_of(own), ids)
        teacher = encoded(tokenizer_of(theirs), student.text)
        chunks = chunks_of(student, teacher)
        at = (0, 0)
        for chunk in chunks:
            assert (chunk.student[0], chunk.teacher[0]) == at and min(chunk.sizes) >= 1
            at = chunk.student[1], chunk.teacher[1]
        if student.text and teacher.token_ids:
            assert at == (len(ids), len(teacher.token_ids))
            assert "".join(chunk.text for chunk in chunks) == student.text
        generator = torch.Generator().manual_seed(n)
        theirs_T, own_T = (-5 * torch.rand(len(x), generator=generator) for x in (teacher.token_ids, ids))
        credits: tuple[Literal["proportional", "additive", "uniform"], ...] = ("proportional", "additive", "uniform")
        for credit in credits:
            logprobs_T, read_T = credited(chunks, theirs_T, own_T, len(ids), credit, torch.inf)
            assert bool((logprobs_T <= 0).all())
            for chunk in chunks:
                total = logprobs_T[slice(*chunk.student)].double().sum()
                torch.testing.assert_close(total, theirs_T[slice(*chunk.teacher)].double().sum(), rtol=1e-5, atol=1e-5)
            assert bool(read_T.all()) == (at[0] == len(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_cut_by_one_tokenizer_twice_has_chunks_of_one_token(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for text in texts(2, 60):
        ids = tokenizer.encode(text, add_special_tokens=False)
        student = spelled(tokenizer, ids)
        again = encoded(tokenizer, student.text)
        if [*again.token_ids] != ids:
            continue  # the tokenizer loses text
        ends = (0, *student.ends)
        for chunk in chunks_of(student, again):
            assert chunk.student == chunk.teacher
            inside = range(chunk.student[0] + 1, chunk.student[1] + 1)
            written = [ends[n] != ends[n - 1] and ends[n] is not None for n in inside]
            assert chunk.is_single or not all(written)


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_after_a_token_is_what_a_decoder_writes_of_the_tokens_up_to_there(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    for ids in responses(kind, 3, 20):
        found = spelled(tokenizer, ids)
        assert found.text == decode(tokenizer, ids)
        for n, end in enumerate(found.ends):
            if end is not None:
                assert decode(tokenizer, ids[: n + 1]) == found.text[:end]


@pytest.mark.parametrize(("own", "theirs"), [pair for pair in PAIRS if pair[0] != pair[1]][:4])
def test_a_dropped_or_shifted_token_is_seen(own: str, theirs: str) -> None:
    """The check of the first test fails where an alignment is off by one."""
    (ids, *_) = [ids for ids in responses(own, 4, 20) if len(ids) > 8]
    student = spelled(tokenizer_of(own), ids)
    chunks = chunks_of(student, encoded(tokenizer_of(theirs), student.text))
    shifted = [chunk.moved(1, 0) for chunk in chunks]
    assert any(student.text[: student.ends[c.student[1] - 1] or 0] != "".join(x.text for x in chunks[: n + 1])
               for n, c in enumerate(shifted[:-1]))  # fmt: skip


def test_broken_characters_unknown_words_and_long_chunks_teach_nothing() -> None:
    tokenizer: Any = tokenizer_of("byte-level")
    pieces = tokenizer.encode("汉", add_special_tokens=False)
    first = tokenizer.convert_tokens_to_ids("æ")  # the first of three bytes
    student = spelled(tokenizer, [first, *tokenizer.encode(" fox", add_special_tokens=False)])
    teacher = encoded(tokenizer_of("characters"), student.text)
    broken, *_ = chunks_of(student, teacher)
    assert pieces and not is_read(broken, teacher, 6, None)
    whole = encoded(tokenizer_of("characters"), "dog")
    assert is_read(Chunk((0, 1), (0, 3), "dog"), whole, 3, None)
    assert not is_read(Chunk((0, 1), (0, 3), "dog"), whole, 2, None)
    assert not is_read(Chunk((0, 1), (0, 3), "dog"), whole, 3, whole.token_ids[1])


def test_additive_credit_is_the_nearest_to_the_student_that_keeps_the_sum_and_is_a_log_probability() -> None:
    """(L_T - L_S) / m to each token, as in the paper, and what would be above 0 goes to the others."""

    def shared(teacher: float, *student: float) -> list[float]:
        chunk = [Chunk((0, len(student)), (0, 1), "dog")]
        found, _ = credited(chunk, torch.tensor([teacher]), torch.tensor(student), len(student), "additive", torch.inf)
        return found.tolist()

    assert shared(-9.0, -1.0, -2.0) == [-4.0, -5.0]
    assert shared(-2.0, -1.0, -4.0, -4.0) == pytest.approx([0.0, -1.0, -1.0])  # not +1, -2, -2 made 0, -2, -2
    assert shared(0.0, -1.0, -3.0) == [0.0, 0.0]
    assert shared(-1.0, 0.0, 0.0) == [-0.5, -0.5]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        own = -3 * torch.rand(4, generator=generator)
        total = -4 * float(torch.rand(1, generator=generator))
        best = float((torch.tensor(shared(total, *own.tolist())) - own).square().sum())
        weights = torch.rand(500, 4, generator=generator).log().mul(3).softmax(1)
        assert best <= float((total * weights - own).square().sum(1).min()) + 1e-5


def test_a_letter_and_its_accent_are_one_piece_to_a_tokenizer_that_joins_them() -> None:
    tokenizer = copy.deepcopy(tokenizer_of("byte-level"))
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    student = spelled(
        tokenizer_of("characters"), tokenizer_of("characters").encode("e\u0301 ok", add_special_tokens=False)
    )
    pieces = [chunk.text for chunk in chunks_of(student, encoded(tokenizer, student.text))]
    assert pieces[0] == "e\u0301" and "".join(pieces) == student.text
