from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import byte_tokenizer
from tropd.config.stages import DataConfig
from tropd.data.prompts import LoadedPrompts, load_prompts
from tropd.errors import ConfigError, DataError
from tropd.types import Message

USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def load(folder: Path, rows: list[Any], **knobs: Any) -> LoadedPrompts:
    return load_prompts(DataConfig(path=write(folder, rows), **knobs), byte_tokenizer())


def test_text_becomes_a_users_message_with_its_answer_and_columns(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, [{"prompt": "2+2?", "answer": 4, "level": "easy"}]).prompts
    assert byte_tokenizer().decode(list(prompt.token_ids)) == "<|user|>2+2?<|end|><|assistant|>"
    assert prompt.messages == (Message(role="user", content="2+2?"),)
    assert (prompt.answer, prompt.teacher, prompt.response_ids) == ("4", "default", ())
    assert prompt.columns == {"level": "easy"}


def test_text_messages_and_prompts_of_messages_are_the_same_prompt(tmp_path: Path) -> None:
    rows: list[Any] = [{"prompt": "2+2?"}, {"prompt": [USER]}, {"messages": [USER, ASSISTANT]}]
    (first,), (second,), (third,) = (load(tmp_path, [row]).prompts for row in rows)
    assert first == second == third


def test_text_stays_as_it_is_without_a_template(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, [{"prompt": "2+2?"}], apply_chat_template=False).prompts
    assert (prompt.token_ids, prompt.messages) == (tuple(byte_tokenizer().encode("2+2?")), ())


def test_a_base_tokenizer_is_warned_about_and_refuses_conversations(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    loaded = load_prompts(DataConfig(path=write(tmp_path, [{"prompt": "2+2?"}])), tokenizer)
    assert loaded.prompts[0].token_ids == tuple(tokenizer.encode("2+2?"))
    assert "no chat template" in loaded.report.warnings[0]
    with pytest.raises(ConfigError, match="holds conversations"):
        load_prompts(DataConfig(path=write(tmp_path, [{"prompt": [USER]}])), tokenizer)


def test_knobs_that_would_do_nothing_are_refused(tmp_path: Path) -> None:
    for knob in ({"system_prompt": "Be kind."}, {"chat_template_kwargs": {"enable_thinking": False}}):
        with pytest.raises(ConfigError, match=next(iter(knob))):
            load(tmp_path, [{"prompt": "x"}], apply_chat_template=False, **knob)
    with pytest.raises(ConfigError, match="tokenize"):
        DataConfig(path="x", chat_template_kwargs={"tokenize": True})
    with pytest.raises(ConfigError, match="data.limit = 0 was asked for"):
        DataConfig(path="x", limit=0)


def test_a_keyword_the_template_never_reads_is_a_warning(tmp_path: Path) -> None:
    report = load(tmp_path, [{"prompt": "x"}], chat_template_kwargs={"enable_thinking": False}).report
    assert "enable_thinking" in str(report)


def test_the_system_prompt_stands_in_the_messages_too(tmp_path: Path) -> None:
    (prompt,) = load(tmp_path, [{"prompt": "x"}], system_prompt="Be kind.").prompts
    assert [message.role for message in prompt.messages] == ["system", "user"]


def test_the_last_turn_of_the_assistant_is_dropped_or_kept(tmp_path: Path) -> None:
    tokenizer, rows = byte_tokenizer(), [{"messages": [USER, ASSISTANT]}]
    (dropped,) = load(tmp_path, rows).prompts
    (kept,) = load(tmp_path, rows, last_assistant="prefix").prompts
    assert dropped.token_ids == kept.token_ids and dropped.response_ids == ()
    assert tokenizer.decode(list(kept.response_ids)) == "4<|end|>"


def test_named_columns_fill_their_fields(tmp_path: Path) -> None:
    row = {"q": "2+2?", "solution": "4", "key": 7, "who": "math", "said": "Four", "level": 1}
    (prompt,) = load(
        tmp_path,
        [row],
        prompt_column="q",
        answer_column="solution",
        id_column="key",
        teacher_column="who",
        response_column="said",
    ).prompts
    assert (prompt.id, prompt.answer, prompt.teacher) == ("7", "4", "math")
    assert byte_tokenizer().decode(list(prompt.response_ids)) == "Four<|end|>"
    assert prompt.columns == {"solution": "4", "level": 1}, "a grader may ask for the answer by its own name"


def test_ids_depend_on_the_content_and_not_on_the_place(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    straight, reversed_ = load(tmp_path, rows).prompts, load(tmp_path, rows[::-1]).prompts
    assert [prompt.id for prompt in straight] == [prompt.id for prompt in reversed_][::-1]
    assert straight[0].id != straight[1].id


BAD_ROWS: list[Any] = [
    {"prompt": "good"},
    {"prompt": "  "},
    {"prompt": 3},
    {"prompt": "x" * 100},
    {"prompt": "good", "answer": "again"},
    {"prompt": [USER, ASSISTANT, ASSISTANT]},
    {"answer": "no prompt"},
    {"prompt": [{"role": "user"}]},
    {"prompt": "fine", "answer": [1]},
]
REASONS = {"empty": 2, "malformed": 4, "too long": 1, "duplicate": 1}


def test_bad_rows_are_counted_by_reason_with_their_numbers(tmp_path: Path) -> None:
    loaded = load(tmp_path, BAD_ROWS, max_prompt_tokens=50)
    report = loaded.report
    assert len(loaded.prompts) == report.num_prompts == 1
    assert report.num_rows == len(BAD_ROWS)
    assert report.skipped == REASONS
    assert [example.partition(":")[0] for example in report.examples["malformed"]] == ["row 3", "row 6", "row 8"]
    assert report.examples["duplicate"] == ("row 5: the same prompt as row 1",)
    for reason in REASONS:
        assert f"{REASONS[reason]} {reason}: row" in str(report)


def test_bad_rows_can_be_refused_all_at_once(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)2 empty: row 2.*4 malformed: row 3.*Repair"):
        load(tmp_path, BAD_ROWS, max_prompt_tokens=50, on_bad_row="refuse")
    assert len(load(tmp_path, BAD_ROWS[:1], on_bad_row="refuse").prompts) == 1


def test_a_missing_value_in_a_named_column_is_a_bad_row(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "hint": "h"}, {"prompt": "b"}, {"prompt": "c", "hint": ""}]
    report = load(tmp_path, rows, response_column="hint").report
    assert report.skipped == {"malformed": 2} and "'hint'" in report.examples["malformed"][0]


def test_two_rows_may_not_share_an_id(tmp_path: Path) -> None:
    report = load(tmp_path, [{"prompt": "a", "id": 1}, {"prompt": "b", "id": "1"}], id_column="id").report
    assert report.examples == {"duplicate": ("row 2: the same id '1' as row 1",)}


def test_a_prompt_for_two_teachers_is_two(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "who": who} for who in ("math", "code", "math")]
    loaded = load(tmp_path, rows, teacher_column="who")
    assert [prompt.teacher for prompt in loaded.prompts] == ["math", "code"]
    assert len({prompt.id for prompt in loaded.prompts}) == 2
    assert loaded.report.examples == {"duplicate": ("row 3: the same prompt as row 1",)}


def test_a_data_set_without_a_single_prompt_is_refused_with_the_reasons(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)no row .* makes a prompt.*2 empty"):
        load(tmp_path, [{"prompt": ""}, {"prompt": " "}])


def test_limit_counts_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": ""}, *({"prompt": str(number)} for number in range(9))]
    loaded = load(tmp_path, rows, limit=3)
    assert [prompt.messages[0].content for prompt in loaded.prompts] == ["0", "1", "2"]


def test_a_prompt_column_wins_over_messages_and_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": "x", "messages": [USER, ASSISTANT]}]
    loaded = load(tmp_path, rows)
    assert loaded.prompts[0].messages[0].content == "x" and "data.prompt_column = 'messages'" in str(loaded.report)
    assert load(tmp_path, rows, prompt_column="messages").prompts[0].messages[0].content == "2+2?"


def test_missing_columns_are_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'promt' .did you mean 'prompt'.*it has prompt, answer"):
        load(tmp_path, [{"prompt": "x", "answer": "y"}], prompt_column="promt")
    with pytest.raises(DataError, match=r"'solution'; it has prompt\. Set data\.answer_column"):
        load(tmp_path, [{"prompt": "x"}], answer_column="solution")
    with pytest.raises(DataError, match="no column 'prompt'; it has question"):
        load(tmp_path, [{"question": "x"}])


def test_streaming_is_not_loaded_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="LazyPromptStream"):
        load(tmp_path, [{"prompt": "x"}], streaming=True)


def test_plain_json_lines_import_nothing_optional(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "x"}])
    code = (
        "import sys; import tropd.data.graders, tropd.data.stream; from tropd.data.rows import open_table; "
        f"assert list(open_table({path!r}).read()) == [(1, {{'prompt': 'x'}})]; "
        "sys.exit(bool({'datasets', 'pyarrow', 'math_verify'} & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root).returncode == 0
