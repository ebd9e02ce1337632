"""The teacher goes on where the student's answers are cut: at 0 it is the teacher, and the student's tokens stay."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest

from tests.evaluation.test_briefed import COLUMN, ODD, lines, numbers, refused
from tests.small_runs import merged, write_run
from tests.tiny import VOCAB, tiny_model
from tests.told import write_world
from tropd.cli.main import main
from tropd.evaluation.decay import Handed
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Finish, Request, Sampling

LIMIT = 8
DRAWN, GREEDY = Sampling(), Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "odd.py").write_text(ODD)
    return folder


def run_file(world: Path, folder: Path, **changes: object) -> str:
    told = str(world / "told.jsonl")
    data = {"num_samples": 2, "max_new_tokens": LIMIT, "data": {"path": told}}
    said = {"data": {"path": told}, "evaluation": data, "method": {"name": "opd"}}
    return str(write_run(world, folder, "quick", **merged(said, changes)))


def engines() -> list[TransformersEngine]:
    return [TransformersEngine(tiny_model(seed=seed, sharp=4.0), vocab_size=VOCAB, max_batch=4) for seed in (0, 1)]


def requests(sampling: Sampling = DRAWN, stop: tuple[int, ...] = ()) -> list[Request]:
    return [
        Request(token_ids=(7, n, 9), max_new_tokens=LIMIT, seed=n, sampling=sampling, stop_ids=stop) for n in range(6)
    ]


def test_the_first_tokens_are_the_students_and_the_others_the_teachers() -> None:
    student, teacher = engines()
    asked = requests(GREEDY)
    assert Handed(student, teacher, 0).generate(asked) == teacher.generate(asked)
    for length in (1, 3, LIMIT - 1):
        handed = Handed(student, teacher, length).generate(asked)
        for request, own, done in zip(asked, student.generate(asked), handed, strict=True):
            begun = own.token_ids[:length]
            rest = replace(request, token_ids=(*request.token_ids, *begun), max_new_tokens=LIMIT - length)
            assert done.token_ids == (*begun, *teacher.generate([rest])[0].token_ids)
            assert len(done.model_logprobs) == len(done.behavior_logprobs) == LIMIT


def test_a_student_that_goes_on_for_itself_writes_its_own_greedy_text() -> None:
    student, _ = engines()
    greedy = requests(GREEDY)
    for length in (0, 2, 5):
        assert [done.token_ids for done in Handed(student, student, length).generate(greedy)] == [
            done.token_ids for done in student.generate(greedy)
        ]


def test_an_answer_that_has_ended_is_not_gone_on_with() -> None:
    student, teacher = engines()
    alone = student.generate(requests())
    stops = tuple({done.token_ids[1] for done in alone})
    ended = student.generate(requests(stop=stops))
    handed = Handed(student, teacher, 4).generate(requests(stop=stops))
    early = [n for n, done in enumerate(ended) if len(done.token_ids) <= 4 and done.finish is Finish.STOP]
    assert early and all(handed[n] == ended[n] for n in early)


def test_decay_is_the_difference_prompt_by_prompt_and_is_drawn_once(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = run_file(world, tmp_path / "run"), tmp_path / "out"
    asked = ["evaluate", run, "--decay", "4", "0", "--grader", f"{world}/odd.py:grade", "--device", "cpu"]
    assert main([*asked, "-o", str(out)]) == 0
    said = capsys.readouterr().out
    teacher = ["evaluate", str(world / "teacher"), "--data", str(world / "told.jsonl"), "--num-samples", "2"]
    limit = ["--max-new-tokens", str(LIMIT), "--grader", f"{world}/odd.py:grade", "--device", "cpu"]
    assert main([*teacher, *limit, "-o", str(tmp_path / "teacher")]) == 0
    first, later, theirs = (
        lines(path) for path in (out / "decay_0.jsonl", out / "decay_4.jsonl", tmp_path / "teacher" / "items.jsonl")
    )
    assert [row["texts"] for row in first.values()] == [row["texts"] for row in theirs.values()]
    assert [row["texts"] for row in later.values()] != [row["texts"] for row in theirs.values()]
    fall = fmean(fmean(row["scores"]) - fmean(first[i]["scores"]) for i, row in later.items())
    found = numbers(out)
    assert found["decay/4/fall"] == pytest.approx(fall) and found["decay/4/fall/low"] <= fall
    assert found["decay/4/avg@2"] - found["decay/0/avg@2"] == pytest.approx(fall)
    early = fmean(number <= 4 for row in later.values() for number in row["num_tokens"])
    assert found["decay/4/ended"] == pytest.approx(early)
    assert f"decay from 0 to 4 tokens {fall:+.3f} [" in said and "the teacher alone: avg@2" in said
    before = (out / "decay_4.jsonl").read_bytes()
    assert main([*asked, "-o", str(out)]) == 0
    assert (out / "decay_4.jsonl").read_bytes() == before and numbers(out) == found
    assert json.loads((out / "items.jsonl").read_text().splitlines()[0])["settings"]["max_new_tokens"] == LIMIT


def test_what_cannot_go_on_is_refused_in_words(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, lora = run_file(world, tmp_path / "run"), {"lora": {"rank": 2}}
    told = run_file(world, tmp_path / "told", teacher={"path": "start", "briefing": COLUMN})
    own = run_file(world, tmp_path / "own", teacher={"path": "student"}, student=lora)
    for said, argv in {
        "give lengths of at least 0 and below --max-new-tokens 8": [run, "--decay", "0", "8"],
        "each once": [run, "--decay", "2", "2"],
        "the teacher of the run is told more": [told, "--decay", "0"],
        "teacher.path = 'student' is no model that is read here": [own, "--decay", "0"],
        "is a model. Give a run file": [str(world / "student"), "--decay", "0", "--data", str(world / "told.jsonl")],
        "--briefed and --decay are two measurements": [run, "--decay", "0", "--briefed"],
        "--decay compares accuracies, and there is no grader": [run, "--decay", "0", "--grader", "None"],
    }.items():
        assert said in refused(capsys, "evaluate", *argv, "--device", "cpu", "-o", str(tmp_path / "out")), argv
    assert not (tmp_path / "out").exists()


def test_the_base_under_an_adapter_goes_on_from_its_files(world: Path, tmp_path: Path) -> None:
    run = run_file(world, tmp_path / "run", teacher={"path": "base"}, student={"lora": {"rank": 2}}, grader="exact")
    asked = ["evaluate", run, "--decay", "3", "--device", "cpu", "-o", str(tmp_path / "out")]
    assert main(asked) == 0
    student, base = (lines(tmp_path / "out" / name) for name in ("items.jsonl", "decay_3.jsonl"))
    assert [row["greedy"] for row in base.values()] == [row["greedy"] for row in student.values()]
