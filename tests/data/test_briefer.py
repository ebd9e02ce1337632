"""A briefing is read, told or refused before the first step."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w

import tropd
from tests.small_runs import run_of, save_model, write_rows
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_model
from tests.told import COLUMN, FEEDBACK, PEERS, WORDS, scored, told, write_world
from tropd.briefings.asked import Asked, Briefing
from tropd.briefings.briefing import AsStudent, OwnBriefing, WithColumn, WithPeers, WithSystem
from tropd.briefings.follow import Copy, Ema
from tropd.cli.main import main
from tropd.config.run import Run
from tropd.config.tables import to_dict
from tropd.data import chat
from tropd.doctor import examine
from tropd.errors import CheckpointError, ConfigError, DataError
from tropd.training.assembly import load_parts
from tropd.types import Message


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@dataclass(frozen=True, kw_only=True)
class Twice(Briefing):
    """Says everything as often as asked."""

    times: int = 2

    def messages(self, asked: Asked) -> tuple[Message, ...]:
        return tuple(replace(message, content=message.content * self.times) for message in asked.messages)


def test_a_briefing_of_ones_own_is_found_by_its_name(world: Path, tmp_path: Path) -> None:
    run = told(world, {"kind": f"{__file__}:Twice", "knobs": {"times": 3}})
    assert isinstance(run.teacher.briefing, OwnBriefing) and Run.from_dict(tomllib.loads(run.dump())) == run
    parts = load_parts(run, tmp_path)
    prompt = parts.stream.next(1)[0][0]
    thrice = Message(role="user", content=prompt.messages[0].content * 3)
    assert prompt.told["teacher"] == chat.render((thrice,), parts.tokenizer)
    given = replace(run, teacher=replace(run.teacher, briefing=Twice(times=3)))
    assert given.teacher.briefing.knobs == {"times": 3}  # type: ignore[attr-defined]
    assert load_parts(given, tmp_path).stream.next(1)[0][0].told["teacher"] == prompt.told["teacher"]


def test_a_teacher_that_opens_its_turn_otherwise_is_refused_with_both_ends(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("%}<|assistant|>", "%}<|assistant|>So: ")
    save_model(tmp_path / "thinking", tokenizer=tokenizer)
    run = replace(told(world), teacher=replace(told(world).teacher, path=str(tmp_path / "thinking")))
    with pytest.raises(ConfigError, match=r"student's prompt ends with .*<.assistant.>', the teacher's .*So: '"):
        load_parts(run, tmp_path)


@pytest.mark.parametrize(
    ("briefing", "says"),
    [
        ({"kind": "column"}, "needs column, which has no default"),
        ({"kind": "colum", "column": "x"}, "did you mean 'column'"),
        ({"kind": "column", "colum": "x"}, "no knob 'colum'"),
        ({"column": "x"}, "a table with its kind"),
        ({**COLUMN, "template": "{prompt} {solution} {value}"}, r"has the field \{solution\}"),
        ({**COLUMN, "template": "{value}"}, r"has no \{prompt\}"),
        ({**COLUMN, "template": "{prompt} {value} {"}, "cannot be read"),
        ({"kind": "system", "text": " "}, "which is no text"),
    ],
)
def test_a_briefing_that_cannot_be_read_is_refused(world: Path, briefing: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        told(world, briefing)


@pytest.mark.parametrize(
    ("briefing", "data", "says"),
    [
        ({**COLUMN, "column": "solutoin"}, {}, r"has none \(did you mean 'solution'\?\)"),
        ({**COLUMN, "column": "hint"}, {}, r"row 2: .* nothing in 'hint'"),
        (
            {"kind": "column", "column": "long"},
            {},
            r"2 of 2 prompts .* no room .* of 12 .* the 256 .* with 447 tokens",
        ),
        (COLUMN, {"apply_chat_template": False}, r"\{prompt\} has to be the end of briefing.template"),
        ({"kind": "system", "text": "x"}, {"apply_chat_template": False}, "without a chat template"),
    ],
)
def test_what_cannot_be_told_is_refused_at_the_start(
    world: Path, tmp_path: Path, briefing: Any, data: Any, says: str
) -> None:
    rows = [
        {"prompt": f"{n}+1=", "answer": str(n + 1), "solution": "so", "hint": ["yes", ""][n], "long": "word " * 60}
        for n in range(2)
    ]
    run = told(world, briefing, data={"path": str(write_rows(tmp_path / "rows.jsonl", rows)), **data})
    with pytest.raises((ConfigError, DataError), match=says):
        load_parts(run, tmp_path)
    assert any(check.level == "error" for check in examine(run, num_prompts=0))


@pytest.mark.parametrize(
    ("briefing", "changes", "says"),
    [
        (FEEDBACK, {"grader": None}, "what the grader says .briefing 'feedback'.*there is no grader"),
        (PEERS, {"grader": None}, "the rewards of responses"),
        (PEERS, {"rollout": {"num_rollouts": 1}}, "rollout.num_rollouts is 1. Set it to 2"),
        (PEERS, {"method": {"name": "tropd", "top_k": 8}}, "lets the teacher write before there are any"),
    ],
)
def test_what_a_run_never_knows_of_responses_cannot_be_told(
    world: Path, tmp_path: Path, briefing: Any, changes: Any, says: str
) -> None:
    run = told(world, briefing, **{k: v for k, v in changes.items() if v})
    run = run if changes.get("grader", run) else replace(run, grader=None)
    with pytest.raises(ConfigError, match=says):
        load_parts(run, tmp_path)
    assert any(check.level == "error" for check in examine(run, num_prompts=0))


def test_each_reader_is_told_its_own_and_the_briefer_answers_by_name(world: Path, tmp_path: Path) -> None:
    readers = {"hinted": {"briefing": COLUMN}, "judge": {"briefing": FEEDBACK}, "plain": {}}
    parts = load_parts(told(world, {"kind": "system", "text": "Hi."}, grader=WORDS, readers=readers), tmp_path)
    rollouts, _ = scored(parts)
    assert {tuple(sorted(r.prompt.told)) for r in rollouts} == {("hinted", "teacher")}

    def turns(reader: str) -> list[str]:
        reads = parts.briefer.as_read(reader, rollouts)
        assert [r.response_ids for r in rollouts] == [read and read.response_ids for read in reads]
        return [str(parts.tokenizer.decode(list(read.prompt.token_ids))) for read in reads if read]

    asked = [r.prompt.messages[0].content for r in rollouts]
    assert turns("teacher") == [f"<|system|>Hi.<|end|><|user|>{q}<|end|><|assistant|>" for q in asked]
    assert turns("plain") == [f"<|user|>{q}<|end|><|assistant|>" for q in asked]
    solutions = [r.prompt.columns["solution"] for r in rollouts]
    assert turns("hinted") == [f"<|user|>{q} ({s})<|end|><|assistant|>" for q, s in zip(asked, solutions, strict=True)]
    assert turns("judge") == [
        f"<|user|>[{r.feedback}] {q}<|end|><|assistant|>" for q, r in zip(asked, rollouts, strict=True)
    ]


def test_what_readers_read_does_not_depend_on_the_order_of_the_rollouts(world: Path, tmp_path: Path) -> None:
    parts = load_parts(told(world, PEERS, grader=WORDS, rollout={"num_rollouts": 12, "num_prompts": 2}), tmp_path)
    rollouts, _ = scored(parts)
    whole = dict(zip([r.id for r in rollouts], parts.briefer.as_read("teacher", rollouts), strict=True))
    assert parts.briefer.as_read("teacher", rollouts[::-1]) == [whole[r.id] for r in rollouts[::-1]]
    for group in {r.group for r in rollouts}:
        own = [r for r in rollouts if r.group == group]
        assert parts.briefer.as_read("teacher", own) == [whole[r.id] for r in own]
    assert sum(read is not None for read in whole.values()) > 12


def test_flags_set_a_briefing_and_another_kind_begins_anew(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(told(world, readers={"judge": {}}, grader=WORDS).dump())

    def read(*flags: str) -> Run:
        return Run.load(path, flags)

    hinted = read("--teacher.briefing.column", "hint").teacher.briefing
    assert hinted == WithColumn(column="hint", template=COLUMN["template"])
    system = read("--teacher.briefing.text", "Be brief.", "--teacher.briefing.kind=system")
    assert system.teacher.briefing == WithSystem(text="Be brief.")
    assert read("--teacher.briefing", "as_student").teacher.briefing == AsStudent()
    peers = read("--readers.judge.briefing.kind", "peers", "--readers.judge.briefing.failures", "0")
    assert peers.readers["judge"].briefing == WithPeers(failures=0) and peers.teacher == read().teacher
    with pytest.raises(ConfigError, match="needs text"):
        read("--teacher.briefing.kind", "system")


@pytest.mark.parametrize("before", ["frozen", "copy", {"rule": "ema", "decay": 0.9, "every": 3}])
def test_flags_set_how_a_teacher_follows_whatever_the_file_says(world: Path, tmp_path: Path, before: Any) -> None:
    path = tmp_path / "run.toml"
    run = told(world, teacher_section={"path": "start", "follow": before}, readers={"old": {"path": "start"}})
    path.write_text(run.dump())
    flags = ["--teacher.follow.rule", "ema", "--teacher.follow.decay", "0.5"]
    every = 3 if isinstance(before, dict) else 1
    assert Run.load(path, flags).teacher.follow == Ema(decay=0.5, every=every)
    without = to_dict(run)
    del without["teacher"]["follow"]
    path.write_text(tomli_w.dumps(without))
    assert Run.load(path, flags).teacher.follow == Ema(decay=0.5)
    assert Run.load(path, ["--teacher.follow", "copy"]).teacher.follow == Copy()
    assert Run.load(path, ["--readers.old.follow.rule=ema"]).readers["old"].follow == Ema()
    with pytest.raises(ConfigError, match="no rule 'emu' to follow by"):
        Run.load(path, ["--teacher.follow.rule", "emu"])


def test_the_doctor_shows_what_is_told_of_responses_and_whom(world: Path, tmp_path: Path) -> None:
    run = told(world, FEEDBACK, grader=WORDS, readers={"peers": {"briefing": PEERS}, "hinted": {"briefing": COLUMN}})
    shown = [str(check) for check in examine(run, num_prompts=0) if check.name == "briefing"]
    assert len(shown) == 3 and all("<|user|>0+0=<|end|>" in each for each in shown)
    assert "the teacher is told of responses, once they are graded" in shown[0]
    assert "<|user|>[...] 0+0=<|end|>" in shown[0] and r"right ...\n\nwrong ....; 0+0=<|end|>" in shown[1]
    assert "reader 'hinted' is told more" in shown[2] and "0+0= (0 after 0)<|end|>" in shown[2]
    for briefing in (FEEDBACK, PEERS):
        checks = examine(told(world, briefing, grader=WORDS), num_prompts=3, max_new_tokens=12)
        assert not [str(check) for check in checks if check.level == "error"]


def test_plain_text_is_told_in_front_of_the_prompt(world: Path, tmp_path: Path) -> None:
    run = told(world, {**COLUMN, "template": "{value}. {prompt}"}, data={"apply_chat_template": False})
    parts = load_parts(run, tmp_path)
    prompt = parts.stream.next(1)[0][0]
    said = f"{prompt.columns['solution']}. {parts.tokenizer.decode(list(prompt.token_ids))}"
    assert parts.tokenizer.decode(list(prompt.told["teacher"])) == said


def test_a_system_text_joins_the_one_that_is_there() -> None:
    turns = (Message(role="system", content="a"), Message(role="user", content="b"))
    assert WithSystem(text="c").messages(Asked(messages=turns))[0].content == "a\n\nc"
    assert WithSystem(text="c").messages(Asked(messages=turns[1:]))[0] == Message(role="system", content="c")


def test_the_default_template_holds_the_prompt_and_the_column() -> None:
    (told,) = WithColumn(column="x").messages(
        Asked(messages=(Message(role="user", content="1+1? {a}"),), row={"x": "two: \\boxed{2}"})
    )
    assert told.content.startswith("1+1? {a}") and "\\boxed{2}" in told.content


def test_a_server_that_is_told_messages_of_the_student_is_refused(world: Path) -> None:
    section = {"servers": ["http://127.0.0.1:1"], "server": {"text": "chat"}}
    with pytest.raises(ConfigError, match="whose messages are the student's"):
        told(world, teacher_section=section)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"teacher": {"path": "start", "servers": ["http://x"]}}, "does not say what they serve"),
        ({"teacher": {"path": "student", "servers": ["http://x"]}}, "does not say what they serve"),
        ({"teacher": {"path": "student"}, "optimizer": {"num_updates": 2}}, "changes with every update"),
        ({"teacher": {"path": "student"}, "parallel": {"teacher": "sharded"}}, "that teacher is the student"),
    ],
)
def test_what_the_student_cannot_be_as_its_teacher_is_refused(world: Path, changes: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run_of(world, {"name": "opd"}, **changes)


def test_a_student_given_in_python_has_no_files_to_start_from_again(world: Path, tmp_path: Path) -> None:
    run = run_of(world, {"name": "opd"}, teacher={"path": "start"}, output=str(tmp_path / "run"))
    prescribed = Run(data=run.data, method="opsd", output=str(tmp_path / "other"), given=("student",))
    for each in (run, prescribed):
        with pytest.raises(ConfigError, match="but the student was given in Python"):
            tropd.train(each, student=(tiny_model(tied=True), byte_tokenizer()))


def test_a_copy_whose_files_changed_is_no_longer_the_student_before(tmp_path: Path) -> None:
    write_world(tmp_path)
    output = tmp_path / "run"
    run = run_of(tmp_path, {"name": "opd"}, kind="quick", teacher={"path": "start"}, output=str(output), steps=1)
    tropd.train(run)
    save_model(tmp_path / "student", seed=3)
    with pytest.raises(CheckpointError, match="teacher"):
        tropd.resume(output, steps=2)


def test_code_of_a_briefing_waits_for_leave(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(told(world, {"kind": f"{__file__}:Twice"}).dump())
    assert main(["doctor", str(path), "--sample-prompts", "0"]) == 2
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert "teacher.briefing" in said and "--trust-code" in said
    main(["doctor", str(path), "--sample-prompts", "0", "--trust-code"])
    assert "as the teacher reads it" in capsys.readouterr().out
    path.write_text(told(world, readers={"judge": {"briefing": {"kind": f"{__file__}:Twice"}}}).dump())
    assert main(["doctor", str(path), "--sample-prompts", "0"]) == 2
    printed = capsys.readouterr()
    assert "readers.judge.briefing" in " ".join((printed.out + printed.err).replace("│", " ").split())


def test_a_grader_whose_words_are_told_waits_for_leave(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.toml"
    path.write_text(told(world, FEEDBACK, grader=WORDS).dump())
    assert main(["doctor", str(path), "--sample-prompts", "0"]) == 2
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).replace("│", " ").split())
    assert "grader" in said and "--trust-code" in said and "there is no grader" not in said
