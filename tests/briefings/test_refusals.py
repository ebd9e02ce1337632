"""What a briefing refuses: knobs of the wrong kind, templates that format, and what would tell nothing in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import write_rows
from tests.told import COLUMN, SHOWN, scored, told, write_world
from tropd.briefings.asked import Asked
from tropd.briefings.briefing import WithColumn, read_briefing
from tropd.errors import ConfigError, DataError
from tropd.training.assembly import load_parts
from tropd.types import Message


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"kind": "feedback", "answer": "false"}, "briefing.answer is 'false', which is neither true nor false"),
        ({"kind": "demonstrations", "good": "false"}, "briefing.good is 'false'"),
        ({"kind": "peers", "threshold": float("nan")}, "briefing.threshold is nan"),
        ({"kind": "peers", "threshold": float("inf")}, "briefing.threshold is inf"),
        ({"kind": "peers", "threshold": True}, "briefing.threshold is True"),
        ({"kind": "column", "column": "a", "template": "{prompt} {value:d}"}, "formats the field {value}"),
        ({"kind": "column", "column": "a", "template": "{prompt} {value!r}"}, "formats the field {value}"),
        ({"kind": "column", "column": "a", "template": "{prompt} {value:{prompt}}"}, "formats the field {value}"),
    ],
)
def test_a_knob_of_the_wrong_kind_is_refused_when_the_file_is_read(table: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_briefing(table)


def test_a_number_that_is_missing_is_nothing_to_tell() -> None:
    asked = Asked(messages=(Message(role="user", content="q"),), row={"a": float("nan")})
    with pytest.raises(DataError, match="nothing in 'a'"):
        WithColumn(column="a").messages(asked)


def test_a_briefing_that_the_chat_template_leaves_out_is_refused(tmp_path: Path) -> None:
    """Otherwise a student would be its own teacher, and learn rounding noise."""
    world = write_world(tmp_path)
    for folder in ("student", "copy"):
        path = world / folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "chat_template": SILENT}))
        (world / folder / "chat_template.jinja").unlink(missing_ok=True)
    load_parts(told(world, COLUMN), tmp_path)
    with pytest.raises(ConfigError, match="the teacher is told more than the student, but its chat template leaves"):
        load_parts(told(world, {"kind": "system", "text": "Think first."}), tmp_path)


SILENT = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
OWN = """
from dataclasses import dataclass

from tropd import Briefing


@dataclass(frozen=True, kw_only=True)
class Mine(Briefing):
    does: str = "raises"

    def messages(self, asked):
        if self.does == "raises":
            return asked.row["nowhere"]
        return {"text": "a text", "dicts": ({"role": "user", "content": "x"},), "empty": ()}[self.does]
"""


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("raises", r"row \d+: .*briefing Mine fails with KeyError: 'nowhere'"),
        ("text", r"row \d+: .*briefing Mine returns 'a text', and a tuple of tropd.types.Message is asked for"),
        ("dicts", "briefing Mine returns"),
        ("empty", r"briefing Mine returns \(\)"),
    ],
)
def test_a_briefing_of_ones_own_that_goes_wrong_is_named_with_the_row(tmp_path: Path, does: str, said: str) -> None:
    world = write_world(tmp_path)
    (world / "mine.py").write_text(OWN)
    briefing = {"kind": f"{world / 'mine.py'}:Mine", "knobs": {"does": does}}
    with pytest.raises(DataError, match=said):
        load_parts(told(world, briefing), tmp_path)


LATE = """
from dataclasses import dataclass
from typing import ClassVar

from tropd import Briefing
from tropd.briefings.asked import Facts


@dataclass(frozen=True, kw_only=True)
class Late(Briefing):
    needs: ClassVar[Facts] = Facts.RESPONSE

    def messages(self, asked):
        return asked.last_turn("{prompt} again") if not asked.response.text else asked.row["nowhere"]
"""


def test_a_briefing_that_goes_wrong_at_a_response_names_prompt_and_response(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    (world / "late.py").write_text(LATE)
    parts = load_parts(told(world, {"kind": f"{world / 'late.py'}:Late"}), tmp_path)
    with pytest.raises(
        DataError, match=r"prompt '\w+': the teacher .* response .*Late fails with KeyError.*\[teacher\]"
    ):
        scored(parts)


def test_examples_that_tell_nobody_anything_are_refused_when_prompts_are_loaded(tmp_path: Path) -> None:
    world = write_world(tmp_path)
    with pytest.raises(DataError, match=r"in \[teacher\] finds nothing to tell the teacher of any of 9 prompts"):
        load_parts(told(world, {**SHOWN, "pick": "nearest", "draw": 40}), tmp_path)
    write_rows(world / "one.jsonl", [{"prompt": "0+1=", "answer": "1", "solution": "1"}])
    with pytest.raises(DataError, match="finds nothing to tell the teacher of any of 1 prompts"):
        load_parts(told(world, {**SHOWN, "pick": "random"}, data={"path": str(world / "one.jsonl")}), tmp_path)


def test_the_data_set_of_the_run_is_known_by_its_path_too(tmp_path: Path) -> None:
    """A row shows nobody its own solution, although `briefing.source` names the file."""
    world, path = write_world(tmp_path), tmp_path / "worded.jsonl"
    rows = [{"prompt": f"Say {n}", "question": str(n), "answer": "1", "solution": f"<{n}>"} for n in range(3)]
    write_rows(path, rows)
    shown = {**SHOWN, "pick": "random", "count": 9, "problem": "question", "source": str(path)}
    parts = load_parts(told(world, shown, data={"path": str(path)}), tmp_path)
    prompts = [rollout.prompt for rollout in scored(parts)[0]]
    for prompt in prompts:
        number = str(parts.tokenizer.decode(list(prompt.token_ids))).split("Say ")[1][0]
        text = str(parts.tokenizer.decode(list(prompt.told["teacher"])))
        assert f"<{number}>" not in text and text.count("<") > 2


def test_a_message_names_the_section_of_its_reader(tmp_path: Path) -> None:
    run = told(write_world(tmp_path), {**COLUMN, "column": "nowhere"})
    with pytest.raises(DataError, match=r"Set briefing.column in \[teacher\]"):
        load_parts(run, tmp_path)
