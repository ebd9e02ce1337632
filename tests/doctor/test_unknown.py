"""Text that the tokenizer has no tokens for is told before a run begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.small_runs import run_of, save_model, write_rows
from tropd.doctor import Check, examine


def said_of(tmp_path: Path, rows: list[dict[str, str]], **special: str) -> list[Check]:
    """What the doctor says of text that is not known; no weights are read.

    The tokenizer knows digits and a few signs, and nothing else.
    """
    known = {text: n for n, text in enumerate(["<unk>", "<end>", *"0123456789+= "])}
    core = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"unk_token": "<unk>", "eos_token": "<end>", **special}
    model = save_model(tmp_path / "model", tokenizer=PreTrainedTokenizerFast(tokenizer_object=core, **names))
    both: Any = {side: {"path": str(model)} for side in ("student", "teacher")}
    data = write_rows(tmp_path / "data.jsonl", rows)
    run = run_of(tmp_path, data={"path": str(data)}, grader=None, **both)
    return [check for check in examine(run, num_prompts=0) if check.name == "unknown tokens"]


@pytest.mark.parametrize(("num_bad", "num_warnings"), [(0, 0), (1, 0), (4, 1), (60, 2)])
def test_text_that_the_tokenizer_does_not_know_is_warned_of_from_a_few_percent(
    tmp_path: Path, num_bad: int, num_warnings: int
) -> None:
    """Of 240 tokens of prompts and 120 of answers: 4 are 1.7 % of the ones and 3.3 % of the others."""
    rows = [{"prompt": f"{n:02}+1", "answer": "12"} for n in range(60)]
    for row in rows[:num_bad]:
        row["prompt"] = row["prompt"].replace("+", "\u00d7")
        row["answer"] = "1\u00bd"
    found = said_of(tmp_path, rows)
    assert [check.level for check in found] == ["warning"] * num_warnings
    if num_bad == 60:
        assert "60 of 240 tokens of the prompts (25%) are <unk>" in found[0].found and "'0 0 <unk> 1'" in found[0].found
        assert "60 of 120 tokens of the answers (50%)" in found[1].found


def test_an_unknown_token_that_is_the_end_of_text_is_not_counted(tmp_path: Path) -> None:
    """GPT-2's tokenizer calls its end of text unknown too, and knows every byte."""
    rows = [{"prompt": f"{n}\u00d7", "answer": "1"} for n in range(9)]
    assert said_of(tmp_path, rows) and not said_of(tmp_path, rows, eos_token="<unk>")
