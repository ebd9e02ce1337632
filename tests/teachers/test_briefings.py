"""What a teacher is told and the student is not: it reads another prompt before the same response."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.servers.mini import MiniServer
from tests.small_runs import run_of
from tests.tiny import tiny_model
from tests.told import COLUMN, FEEDBACK, WORDS, by_hand, scored, told, write_world
from tropd.data import chat
from tropd.doctor import examine
from tropd.doctor.cost import need_of
from tropd.doctor.subject import read_subject
from tropd.monitoring.records import read_records
from tropd.run.start import train
from tropd.training.assembly import load_parts
from tropd.training.source import Source
from tropd.types import READER, Author, Message

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("family", ["qwen3", "llama", "gpt2"])
def test_a_told_teacher_scores_the_response_behind_its_own_prompt(tmp_path: Path, family: str) -> None:
    parts = load_parts(told(write_world(tmp_path, family)), tmp_path)
    rollouts, batch = scored(parts)
    model, expected = parts.teacher.forward.model, []
    for rollout in rollouts:
        solution = rollout.prompt.columns["solution"]
        said = Message(role="user", content=f"{rollout.prompt.messages[0].content} ({solution})")
        ids = chat.render((said,), parts.tokenizer)
        assert rollout.prompt.told[READER] == ids != rollout.prompt.token_ids
        expected.append(by_hand(model, ids, rollout.response_ids, parts.vocab_size))
    torch.testing.assert_close(batch.tokens.teacher_logprobs_N, torch.cat(expected), **CLOSE)
    ratio_N = batch.tokens.log_ratio_N
    assert float(ratio_N.abs().mean()) > 0.05, "a solution in the prompt says something"


def test_a_copy_that_is_told_nothing_has_nothing_to_teach(world: Path, tmp_path: Path) -> None:
    _, batch = scored(load_parts(told(world, "as_student"), tmp_path))
    assert not batch.tokens.log_ratio_N.any()


@pytest.mark.parametrize("method", ["tip", "gkd"])
def test_divergences_and_whole_distributions_are_those_of_what_the_teacher_reads(
    world: Path, tmp_path: Path, method: str
) -> None:
    _, same = scored(load_parts(told(world, "as_student", method={"name": method}), tmp_path / "same"))
    parts = load_parts(told(world, method={"name": method}), tmp_path / "told")
    rollouts, batch = scored(parts)
    if method == "tip":
        assert not same.tokens.reverse_kl_N.any() and float(batch.tokens.reverse_kl_N.mean()) > 0.01
        return
    whole_NV = parts.teacher.forward.full_logprobs(batch.tokens.teacher_hidden_NH, batch.tokens.token_ids_N)
    ids_N1 = batch.tokens.token_ids_N[:, None]
    own = [by_hand(parts.model, r.prompt.told[READER], r.response_ids, parts.vocab_size) for r in rollouts]
    torch.testing.assert_close(whole_NV.gather(1, ids_N1)[:, 0], torch.cat(own), **CLOSE)


def test_rollouts_keep_the_students_prompt_and_prefixes_are_written_from_the_teachers(
    world: Path, tmp_path: Path
) -> None:
    method = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 0.9}}
    parts = load_parts(told(world, teacher="teacher", method=method), tmp_path)
    rollouts = Source(parts).take(0).rollouts
    model, num = parts.teacher.forward.model, 0
    for rollout in rollouts:
        prompt = rollout.prompt
        assert rollout.token_ids[: len(prompt.token_ids)] == prompt.token_ids
        (read,) = parts.briefer.as_read(READER, [rollout])
        assert read is not None and read.prompt.token_ids == prompt.told[READER]
        assert read.response_ids == rollout.response_ids
        assert len(read.authors) == len(read.token_ids)
        num += rollout.authors.count(Author.TEACHER)
    assert num
    rollout = max(rollouts, key=lambda r: r.authors.count(Author.TEACHER))
    own = by_hand(model, rollout.prompt.told[READER], rollout.response_ids, parts.vocab_size)
    other = by_hand(model, rollout.prompt.token_ids, rollout.response_ids, parts.vocab_size)
    written = rollout.authors.count(Author.TEACHER)
    assert float(own[:written].mean()) > float(other[:written].mean()), "its texts are likelier where it wrote them"


def test_each_of_several_teachers_is_told_its_own(world: Path, tmp_path: Path) -> None:
    teachers = {
        "even": {"path": str(world / "copy"), "briefing": {"kind": "system", "text": "Be brief."}},
        "odd": {"path": str(world / "teacher")},
    }
    run = run_of(
        world,
        {"name": "opd"},
        kind="quick",
        teacher={"path": "base"},
        teachers=teachers,
        data={"path": str(world / "told.jsonl"), "teacher_column": "kind"},
        rollout={"num_prompts": 9},
    )
    parts = load_parts(run, tmp_path)
    rollouts, batch = scored(parts)
    expected = []
    for rollout in rollouts:
        name, prompt = rollout.prompt.teacher, rollout.prompt
        if name == "even":
            ids = chat.render((Message(role="system", content="Be brief."), *prompt.messages), parts.tokenizer)
        else:
            ids = prompt.token_ids
            assert not prompt.told
        model = parts.teacher.teachers[name].forward.model
        expected.append(by_hand(model, ids, rollout.response_ids, parts.vocab_size))
    torch.testing.assert_close(batch.tokens.teacher_logprobs_N, torch.cat(expected), **CLOSE)


def test_a_told_teacher_on_a_server_says_the_same_and_its_kept_scores_are_of_its_prompt(
    world: Path, tmp_path: Path
) -> None:
    method = {"name": "full_fkl", "top_k": 8}
    _, local = scored(load_parts(told(world, method=method), tmp_path / "local"))
    folder = tmp_path / "far"
    folder.mkdir()
    with MiniServer(world / "copy") as server:
        section = {"servers": [server.url], "score_cache": True}
        asked = []
        for briefing, agrees in ((COLUMN, True), ("as_student", False), (COLUMN, True)):
            parts = load_parts(told(world, briefing, method=method, teacher_section=section), folder)
            before = len(server.requests)
            _, far = scored(parts)
            parts.teacher.close()
            asked.append(len(server.requests) - before)
            gap_N = (local.tokens.teacher_logprobs_N - far.tokens.teacher_logprobs_N).abs()
            assert (float(gap_N.max()) < 1e-3) == agrees
        assert asked[0] and asked[1] and not asked[2]


def test_a_teacher_on_a_server_that_is_told_of_grades_is_asked_after_them(world: Path, tmp_path: Path) -> None:
    with MiniServer(world / "student") as writer, MiniServer(world / "copy") as server:
        for briefing in (COLUMN, FEEDBACK):
            served = {"servers": [writer.url], "staleness": 1}
            section = {"servers": [server.url]}
            run = told(world, briefing, grader=WORDS, teacher_section=section, rollout=served, steps=3)
            parts = load_parts(run, tmp_path)
            source = Source(parts)
            source.take(0)
            source.begin(1)
            assert (source.take(1).scores is None) == (briefing is FEEDBACK)
            parts.engine.close()
            parts.teacher.close()
        directory = train(replace(run, output=str(tmp_path / "run")))
    records = read_records(directory / "records.jsonl").steps
    assert len(records) == 3 and all(record.loss for record in records)


def test_the_doctor_shows_both_prompts(world: Path) -> None:
    shown = next(check for check in examine(told(world), num_prompts=0) if check.name == "briefing")
    assert "<|user|>0+0=<|end|>" in str(shown) and "<|user|>0+0= (0 after 0)<|end|>" in str(shown)


def test_the_student_before_training_is_a_teacher(world: Path, tmp_path: Path) -> None:
    for lora in (None, {"rank": 4, "alpha": 8}):
        student = {"path": str(world / "student"), **({"lora": lora} if lora else {})}
        section = {"path": "start", "briefing": COLUMN}
        run = run_of(
            world,
            {"name": "opd"},
            kind="quick",
            student=student,
            teacher=section,
            data={"path": str(world / "told.jsonl")},
        )
        parts = load_parts(run, tmp_path)
        teacher = parts.teacher.forward.model
        assert (teacher is parts.model) == (lora is not None)
        assert ("teacher" in parts.origins) == (lora is None)
        rollouts, batch = scored(parts)
        fresh = tiny_model(seed=0, tied=True)
        expected = [by_hand(fresh, r.prompt.told[READER], r.response_ids, parts.vocab_size) for r in rollouts]
        torch.testing.assert_close(batch.tokens.teacher_logprobs_N, torch.cat(expected), **CLOSE)


def test_a_copy_of_the_student_is_counted_and_its_base_is_not(world: Path) -> None:
    sizes = []
    for lora in ({}, {"lora": {"rank": 4}}):
        student = {"path": str(world / "student"), **lora}
        subject, _ = read_subject(run_of(world, {"name": "opd"}, student=student, teacher={"path": "start"}))
        assert subject is not None
        sizes.append(need_of(subject).teacher)
    weights = sum(p.numel() * p.element_size() for p in tiny_model(tied=True).parameters())
    assert sizes == [weights, 0]


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
@pytest.mark.parametrize("method", ["opd", "tip", "full_fkl", "minillm"])
def test_the_student_as_it_is_now_has_nothing_to_teach_until_it_is_told_more(
    world: Path, tmp_path: Path, lora: Any, method: str
) -> None:
    student = {"path": str(world / "student"), **({"lora": lora} if lora else {})}
    data = {"path": str(world / "told.jsonl")}
    for briefing in ("as_student", COLUMN):
        section = {"path": "student", "briefing": briefing}
        run = run_of(world, {"name": method}, kind="quick", student=student, teacher=section, data=data)
        parts = load_parts(run, tmp_path)
        with torch.no_grad():
            for parameter in parts.model.parameters():
                parameter.add_(0.01 * parameter)  # it is another student by now
        rollouts, batch = scored(parts)
        assert bool(batch.tokens.log_ratio_N.any()) == (briefing is COLUMN)
        expected = [
            by_hand(parts.model, r.prompt.told.get(READER, r.prompt.token_ids), r.response_ids, parts.vocab_size)
            for r in rollouts
        ]
        torch.testing.assert_close(batch.tokens.teacher_logprobs_N, torch.cat(expected), **CLOSE)
        assert parts.teacher.forward.model is parts.model and "teacher" not in parts.origins
