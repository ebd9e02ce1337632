from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests.report.examples import rollout
from tests.small_runs import run_of, write_models
from tropd.monitoring.rollouts import NUM_ALTERNATIVES, pieces, text_alone, write_rollouts
from tropd.objective.support import NOTHING
from tropd.run.start import train


def test_a_saved_rollout_keeps_every_number_beside_its_token(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    question, answer = (tuple(tiny_tokenizer.encode(text)) for text in ("hi", "yes"))
    rollouts = [rollout("a", question, answer), rollout("b", question[:1], answer[:2])]
    path = write_rollouts(
        tmp_path,
        120,
        rollouts,
        decode=tiny_tokenizer.decode,
        teacher_logprobs_N=torch.tensor([-1.0, -2.0, -math.inf, -4.0, -5.0]),
        weights={"trusted": torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0])},
    )
    assert path == tmp_path / "step_000120.parquet"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    first, second = pq.read_table(path).to_pylist()
    assert first == {
        "id": "a",
        "prompt_id": "prompt-a",
        "prompt": "hi",
        "response": "yes",
        "reward": 1.0,
        "finish": "length",
        "policy_version": [3, 4],
        "token_ids": list(question + answer),
        "token_texts": ["h", "i", "y", "e", "s"],
        "authors": ["context", "context", "teacher", "student", "student"],
        "behavior_logprobs": [None, None, None, -0.5, -1.0],
        "weight_trusted": [None, None, 0.0, 1.0, 0.0],
        "teacher_logprobs": [None, None, -1.0, -2.0, -math.inf],
    }
    assert second["weight_trusted"] == [None, 0.0, 1.0]
    assert second["teacher_logprobs"] == [None, -4.0, -5.0]


def test_only_every_nth_step_saves_rollouts(tmp_path: Path) -> None:
    def saved(every: int) -> list[int]:
        paths = [write_rollouts(tmp_path, step, [], decode=str, every=every) for step in range(5)]
        return [step for step, path in enumerate(paths) if path is not None]

    assert saved(every=2) == [0, 2, 4]
    assert saved(every=0) == []


def test_numbers_for_other_tokens_than_the_responses_are_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="numbers for 2 response tokens"):
        write_rollouts(
            tmp_path, 0, [rollout("a", (1,), (2, 3))], decode=str, weights={"trusted": torch.tensor([0.0, 1.0, 0.0])}
        )


def test_the_pieces_of_a_text_are_one_per_token_and_make_the_text(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "né 🙂 <b>ok</b> \n漢字"
    token_ids = tiny_tokenizer.encode(text)
    parts = pieces(token_ids, tiny_tokenizer.decode)
    assert len(parts) == len(token_ids)
    assert "".join(parts) == text
    assert parts[:4] == ["n", "", "é", " "]
    assert "".join(pieces(token_ids[:2], tiny_tokenizer.decode)) == tiny_tokenizer.decode(token_ids[:2])


def drop_first_space(token_ids: Sequence[int]) -> str:
    """A decoder in the manner of SentencePiece: every token begins with a space, the first one of a text does not."""
    return "".join(f" w{i}" for i in token_ids)[1:]


def test_a_space_that_a_decoder_drops_at_the_start_is_kept_inside() -> None:
    assert pieces([1, 2, 3], drop_first_space) == ["w1", " w2", " w3"]
    assert text_alone(7, drop_first_space) == " w7"


def test_what_the_teacher_would_have_written_is_kept_where_it_was_asked(
    tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    question, answer = (tuple(tiny_tokenizer.encode(text)) for text in ("h", "yes"))
    likely = tiny_tokenizer.encode("abcdefg")
    logprobs_NK = -torch.arange(1.0, 8.0).repeat(3, 1)
    logprobs_NK[1] = NOTHING
    path = write_rollouts(
        tmp_path,
        0,
        [rollout("a", question, answer)],
        decode=tiny_tokenizer.decode,
        student_logprobs_N=torch.tensor([-1.0, math.nan, -3.0]),
        teacher_topk_ids_NK=torch.tensor([likely] * 3),
        teacher_topk_logprobs_NK=logprobs_NK,
    )
    assert path is not None
    [row] = pq.read_table(path).to_pylist()
    assert row["student_logprobs"] == [None, -1.0, None, -3.0]
    assert row["teacher_top_ids"] == [None, likely[:NUM_ALTERNATIVES], None, likely[:NUM_ALTERNATIVES]]
    assert row["teacher_top_texts"] == [None, list("abcde"), None, list("abcde")]
    assert row["teacher_top_logprobs"][3] == [-1.0, -2.0, -3.0, -4.0, -5.0]


@pytest.mark.parametrize("method", ["tropd", "opd"])
def test_a_run_keeps_both_opinions_of_every_response_token(tmp_path: Path, method: str) -> None:
    """With outlier treatment some rows are not in the gradient pass; the sampler's word stands in for them."""
    options = {"prefix": {"shape": "constant", "start": 0.4}, "top_k": 8} if method == "tropd" else {}
    directory = train(run_of(write_models(tmp_path), {"name": method, **options}, steps=1))
    for row in pq.read_table(directory / "rollouts" / "step_000000.parquet").to_pylist():
        assert "".join(row["token_texts"]) == row["prompt"] + row["response"]
        responses = [author != "context" for author in row["authors"]]
        for column in ("student_logprobs", "teacher_logprobs"):
            assert [x is not None for x in row[column]] == responses
        sampled = [
            (own, then)
            for own, then, author in zip(row["student_logprobs"], row["behavior_logprobs"], row["authors"], strict=True)
            if author == "student"
        ]
        assert all(abs(own - then) < 1e-3 for own, then in sampled)
