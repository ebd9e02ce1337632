"""What doctor, plan and explain say of several readers: who is asked for what, and what that costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import run_of, save_model
from tests.teachers.test_combined import METHOD, MIXED, mixed
from tests.tiny import CHAT_TEMPLATE, byte_tokenizer
from tests.told import COLUMN, write_world
from tropd.cli.main import main
from tropd.config.models import TeacherConfig
from tropd.doctor import Check, examine
from tropd.doctor.cost import need_of
from tropd.doctor.readers import asked_of
from tropd.doctor.subject import read_subject, subject_of
from tropd.methods.describe import describe
from tropd.objective.evidence import Needs
from tropd.planning import Device, make_forecast
from tropd.run.start import assemble
from tropd.training.assembly import load_parts

UNITS = Device(name="slow units", memory=1e12, operations=1e3, bandwidth=1e30)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "mixtures.py").write_text(METHOD)
    return folder


def said(checks: list[Check], name: str) -> list[str]:
    return [f"{check.level}: {check.found}" for check in checks if check.name == name]


def need(run: Any) -> Any:
    subject, refusals = read_subject(run)
    assert subject is not None, refusals
    return need_of(subject, torch.device("cpu"))


def test_every_reader_is_asked_for_what_is_read_of_it_and_of_what_is_made_of_it(world: Path) -> None:
    asked = asked_of(mixed(world, "nested", "Parts"))
    top_k = Needs.SAMPLED | Needs.TOPK
    assert asked == {
        "nested": top_k | Needs.STUDENT_TOPK | Needs.TEACHER_ENTROPY,
        "told": Needs.TOPK | Needs.HIDDEN,
        "steered": Needs.NOTHING,
        "teacher": Needs.HIDDEN,
        "start": Needs.HIDDEN,
    }


def test_the_doctor_names_readers_and_what_they_cost(world: Path) -> None:
    checks = examine(mixed(world, "nested"), num_prompts=0)
    assert not [check for check in checks if check.level == "error"]
    lines = said(checks, "readers")[0].removeprefix("ok: ").splitlines()
    told = {line.partition(":")[0]: line for line in lines}
    assert set(told) == {"nested", "steered", "told", "start", "teacher"}
    assert "the mean of steered, told, which costs no weights" in told["nested"] and "asked for full" in told["nested"]
    assert "teacher, steered by 0.5 from start to told" in told["steered"]
    assert "the model of [teacher], without a second copy; told column 'solution'; asked for hidden" in told["told"]
    assert "the student before training" in told["start"] and "of its own" in told["start"]
    assert said(checks, "method") == ["ok: 'mixtures.py:Whole' asks its readers for full, which it can answer"]
    assert said(checks, "readers")[1].startswith("warning: 'mixtures.py:Whole' reads nothing of 'mixed'")


def test_a_whole_examination_takes_a_step_with_several_readers(world: Path) -> None:
    checks = examine(mixed(world, "nested", "Parts"), num_prompts=2, max_new_tokens=8)
    assert [str(check) for check in checks if check.level == "error"] == []
    assert said(checks, "one step")[0].startswith("ok")


def test_a_method_whose_reader_is_not_there_gets_one_sentence(world: Path) -> None:
    checks = examine(mixed(world, "mixt"), num_prompts=0)
    (sentence,) = said(checks, "method")
    assert "reads what reader 'mixt' says (did you mean 'mixed'?)" in sentence and "[readers.mixt]" in sentence


def test_a_reader_with_the_teachers_model_takes_no_memory_and_one_of_its_own_does(world: Path) -> None:
    alone = need(mixed(world, "teacher", readers={}))
    shared = need(mixed(world, "told", readers={"told": MIXED["told"]}))
    other = need(mixed(world, "start", readers={"start": MIXED["start"]}))
    adapted = {"student": {"path": str(world / "student"), "lora": {"rank": 2}}}
    base = need(mixed(world, "start", readers={"start": MIXED["start"]}, **adapted))
    assert shared.teacher == alone.teacher and other.teacher == alone.teacher + other.student
    assert base.teacher == alone.teacher, "the base is in the student"
    made = need(mixed(world, "nested"))
    assert made.teacher == other.teacher and made.logits > other.logits


def test_the_plan_counts_a_forward_pass_for_each_reader(world: Path) -> None:
    def seconds(by: str, readers: Any, cls: str = "Whole") -> dict[str, float]:
        return make_forecast(mixed(world, by, cls, readers=readers, tile_tokens=512), UNITS).seconds

    alone = seconds("teacher", {})
    plain = {"path": "teacher"}
    twice = seconds("both", {"plain": plain, "both": {"mean": ["teacher", "plain"]}})
    assert twice["score"] == pytest.approx(2 * alone["score"]) and "readers" not in twice
    other = seconds("start", {"start": MIXED["start"]})
    assert "score" not in other and other["readers"] == pytest.approx(alone["score"]), "as large as the teacher"
    longer = seconds("told", {"told": MIXED["told"]})
    assert longer["score"] > alone["score"], "what it is told is read as well"
    assert set(seconds("nested", MIXED)) >= {"score", "readers", "train"}


def test_plan_prints_the_readers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(mixed(world, "nested").dump())
    assert main(["plan", str(path), "--cluster", "1xh100", "--trust-code"]) == 0
    text = capsys.readouterr().out
    assert "other readers score" in text and "nested: the mean of steered, told" in text


def test_explain_lists_readers_with_what_they_are_told_and_asked(world: Path, capsys: Any) -> None:
    (world / "brief.py").write_text(
        METHOD
        + "from tropd.briefings.briefing import WithColumn\n"
        + "from tropd.briefings.reader import Direction, Reader\n\n\n@dataclass(frozen=True, kw_only=True)\n"
        + 'class Brief(Parts):\n    """It brings its readers."""\n\n    @property\n    def readers(self):\n'
        + '        told = Reader(model="start", briefing=WithColumn(column="solution"))\n'
        + '        safe = Reader(model="start", direction=Direction(file="d.npy", layer=3, strength=0.5))\n'
        + '        return {"told": told, "safe": safe, "mixed": Reader(mean=("told", "safe"))}\n'
    )
    name = f"{world / 'brief.py'}:Brief"
    rows = {row.name: row for row in describe(name).readers}
    assert rows["told"].told == "column 'solution'" and rows["told"].asked == "top-k, hidden"
    assert rows["told"].model == "the student before training" and rows["safe"].asked == "hidden"
    assert rows["safe"].model == "the student before training, 0.5 x d.npy added at layer 3"
    assert rows["mixed"].model == "the mean of told, safe" and "teacher entropy" in rows["mixed"].asked
    assert main(["explain", name]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Readers" in text and "A run's [teacher] and [readers.NAME]" in text
    bare = {row.name: row for row in describe(f"{world / 'mixtures.py'}:Parts").readers}
    assert bare["mixed"].model == "as [readers.mixed] says" and describe("opd").readers == ()


def test_models_that_are_alike_are_no_news_where_somebody_who_is_told_more_teaches(world: Path, tmp_path: Path) -> None:
    alike = {"path": str(world / "copy")}

    def found(by: str, **readers: Any) -> tuple[list[str], list[str]]:
        run = mixed(world, by, readers=readers, teacher=alike)
        checks = examine(run, num_prompts=2, max_new_tokens=8)
        notes = assemble(run, tmp_path / by).notes
        return said(checks, "agreement"), [note for note in notes if "same weights" in note]

    told, plain = {"path": "teacher", "briefing": COLUMN}, {"path": "teacher"}
    assert found("told", told=told) == (["ok: the teacher is the student; the method learns from told"], [])
    assert found("both", told=told, both={"mean": ["teacher", "told"]})[1] == []
    agreement, notes = found("plain", plain=plain)
    assert agreement[0].startswith("error: the student already is its teacher") and notes
    assert found("both", plain=plain, both={"mean": ["teacher", "plain"]})[1]


def test_a_method_without_a_teacher_is_examined_without_words_on_one(world: Path) -> None:
    data = {"path": str(world / "told.jsonl"), "response_column": "solution"}
    values = run_of(world, {"name": "sft"}, kind="quick", data=data)
    checks = examine(replace(values, teacher=TeacherConfig()), num_prompts=2, max_new_tokens=8)
    assert not [check for check in checks if check.level == "error"]
    words = " ".join(check.found for check in checks)
    assert "the teacher" not in words and "adapter" not in words and "base" not in words
    assert "on 0 tokens" not in said(checks, "one step")[0] and "gradient norm 0:" not in said(checks, "one step")[0]


def test_a_reader_with_a_model_of_its_own_is_shown_what_it_reads_in_training(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m['content'] }}", "[[{{ m['content'] }}]]")
    own = {"path": str(save_model(tmp_path / "own", tokenizer=tokenizer, seed=5)), "briefing": COLUMN}
    run = mixed(world, "own", readers={"own": own})
    (shown,) = said(examine(run, num_prompts=0), "briefing")
    parts = load_parts(run, tmp_path)
    read = [parts.tokenizer.decode(list(prompt.told["own"])) for prompt in subject_of(parts).prompts]
    assert "[[0+0= (0 after 0)]]" in shown and any(repr(text) in shown for text in read)
    other = save_model(tmp_path / "other", tokenizer=byte_tokenizer(vocab=300))
    checks = examine(mixed(world, "own", readers={"own": {"path": str(other)}}), num_prompts=0)
    assert said(checks, "reader 'own'")[0].startswith("error")
    config = save_model(tmp_path / "short") / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 30}))
    checks = examine(mixed(world, "own", readers={"own": {"path": str(config.parent)}}), num_prompts=0)
    assert "the context of the reader 'own', 30 tokens" in said(checks, "lengths")[0]
