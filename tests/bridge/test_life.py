"""A teacher with another tokenizer through the life of a run: other readers, processes, objects, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.bridge.kinds import tokenizer_of
from tests.bridge.test_bridged import bridged, world_of
from tests.distributed.launch import distance
from tests.distributed.launch import run as run_ranks
from tests.small_runs import run_of, write_rows, write_run
from tests.tiny import tiny_model
from tests.told import COLUMN
from tropd.bridge.translation import Bridge
from tropd.cli.main import main
from tropd.config.bridge import BridgeConfig
from tropd.errors import ConfigError
from tropd.methods.explain import explain_as_data
from tropd.rollout.engine import Engine
from tropd.run.start import assemble, resume, train
from tropd.teachers.bridged import BridgedWriter
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.training.source import Source
from tropd.types import Completion, Finish, Request, Sampling

ADAPTED = {"student": {"lora": {"rank": 2}}}
JOINED = {"mean": ["teacher", "second"]}


class Own(Teacher):
    def score(self, request: ScoreRequest) -> list[Any]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world_of(tmp_path_factory.mktemp("world"), "smaller byte-level")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": {"path": "base"}, **ADAPTED}, "its path is 'base', which reads the student's tokens"),
        ({"teacher": {"path": "student"}}, "its path is 'student', which reads the student's tokens"),
        ({"teacher": {"path": "pkg.mine:Own"}}, "its path is 'pkg.mine:Own', which reads the student's tokens"),
        ({"teacher": {"server": {"text": "chat"}}}, 'Set teacher.server.text = "tokens"'),
        ({"readers": {"second": {"path": "teacher", "bridge": {}}}}, r"Take \[readers.second.bridge\] out"),
        ({"readers": {"second": {"path": "start"}, "both": JOINED}}, "reader 'teacher', which has a tokenizer of its"),
        (
            {"readers": {"second": {"path": "teacher", "direction": {"file": "x.npy", "layer": 0}}}},
            "its model is on a server, code of your own, behind a bridge",
        ),
    ],
)
def test_a_bridge_to_what_it_cannot_join_is_refused_when_the_file_is_read(
    changes: dict[str, Any], said: str, world: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        bridged(world, **changes)


def two_teachers(world: Path, **changes: Any) -> Any:
    rows = [{"prompt": f"{a}+{b}=", "answer": "1", "who": ("one", "two")[b]} for a in range(4) for b in range(2)]
    write_rows(world / "two.jsonl", rows)
    teachers = {"one": {"path": str(world / "other"), "bridge": {}}, "two": {"path": str(world / "teacher")}}
    data = {"path": str(world / "two.jsonl"), "teacher_column": "who"}
    alone = {"path": "base", "bridge": None}
    return bridged(world, teacher=alone, teachers=teachers, data=data, **changes)


def test_each_of_several_teachers_reads_its_own_tokens(world: Path, tmp_path: Path) -> None:
    train(two_teachers(world, output=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="reads as the teacher of each prompt"):
        two_teachers(world, readers={"told": {"path": "teacher"}})


def test_a_reader_with_the_teachers_model_reads_the_teachers_tokens(world: Path, tmp_path: Path) -> None:
    parts = assemble(bridged(world, readers={"again": {"path": "teacher"}}), tmp_path)
    rollouts = Source(parts).take(0).rollouts
    theirs, again = (
        [x.token_ids for x in parts.briefer.as_read(name, rollouts) if x is not None] for name in ("teacher", "again")
    )
    assert theirs == again != [x.token_ids for x in rollouts]


def test_objects_given_in_python_cross_a_bridge_and_resume(world: Path, tmp_path: Path) -> None:
    tokenizer = tokenizer_of("unigram")
    given = (tiny_model(vocab=len(tokenizer), seed=3), tokenizer)
    run = run_of(world, {"name": "opd"}, kind="quick", teacher={"bridge": {}}, output=str(tmp_path / "run"), steps=1)
    resume(train(run, teacher=given), teacher=given, steps=2)
    with pytest.raises(ConfigError, match="a class reads the student's tokens"):
        train(run, teacher=Own(), overwrite=True)


def test_a_special_name_that_is_spelled_out_is_text_on_both_sides() -> None:
    """A student that writes the letters of <|end|> does not end the teacher's turn, nor the other way round."""
    student: Any = tokenizer_of("byte-level")
    teacher: Any = tokenizer_of("smaller byte-level")
    bridge = Bridge(student=student, teacher=teacher, config=BridgeConfig())
    letters = [[x.convert_tokens_to_ids(letter) for letter in "<|end|>"] for x in (student, teacher)]
    assert not set(bridge.translate(letters[0], [], False).token_ids) & set(teacher.all_special_ids)
    assert not set(bridge.back(letters[1], False)) & set(student.all_special_ids)


class Writes(Engine):
    """The same ids whatever is asked."""

    def __init__(self, ids: list[int], finish: Finish) -> None:
        self.ids, self.finish, self.context = ids, finish, None

    def generate(self, requests: Any) -> list[Completion]:
        silent = (0.0,) * len(self.ids)
        return [
            Completion(token_ids=tuple(self.ids), behavior_logprobs=silent, model_logprobs=silent, finish=self.finish)
            for _ in requests
        ]


def test_what_a_teacher_writes_ends_where_the_student_ends_it() -> None:
    student: Any = tokenizer_of("characters")
    teacher: Any = tokenizer_of("smaller byte-level")
    bridge = Bridge(student=student, teacher=teacher, config=BridgeConfig())
    ends = tuple(student.convert_tokens_to_ids(["<|eos|>", "<|end|>"]))

    def written(text: str, *more: str, finish: Finish, room: int = 20) -> tuple[str, Finish]:
        ids = teacher.encode(text, add_special_tokens=False) + teacher.convert_tokens_to_ids(list(more))
        request = Request(token_ids=(1,), max_new_tokens=room, seed=0, sampling=Sampling(), stop_ids=ends)
        (found,) = BridgedWriter(Writes(ids, finish), bridge).generate([request])
        return student.decode(found.token_ids), found.finish

    assert written("a dog", "<|end|>", finish=Finish.STOP) == ("a dog<|end|>", Finish.STOP)
    assert written("a dog", finish=Finish.LENGTH) == ("a dog", Finish.LENGTH)
    assert written("a dog", "<|end|>", finish=Finish.STOP, room=3) == ("a d", Finish.LENGTH)
    assert written("a", "<|eos|>", "g", finish=Finish.LENGTH) == ("a<|eos|>", Finish.STOP)
    assert written("a", "æ", finish=Finish.LENGTH) == ("a", Finish.LENGTH)  # the first byte of a character


def test_a_step_is_inspected_by_the_tokens_that_are_taught(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(bridged(world, output=str(tmp_path / "run"), steps=1))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "run"), "--step", "0"]) == 0
    said = capsys.readouterr().out
    assert "x = " in said and "x = unknown" not in said


def test_a_teacher_with_another_tokenizer_is_evaluated_only_by_what_it_is_told(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model itself reads the briefing, in its own tokens."""
    briefings = {}
    for name, changes in (("bridged", {}), ("plain", {"bridge": None, "path": str(world / "teacher")})):
        data = {"path": str(world / "told.jsonl")}
        held_out = {"data": {"path": str(world / "told.jsonl"), "limit": 2}, "max_new_tokens": 4}
        run = bridged(world, teacher={"briefing": COLUMN, **changes}, data=data, evaluation=held_out)
        (tmp_path / f"{name}.toml").write_text(run.dump())
        argv = ["evaluate", str(tmp_path / f"{name}.toml"), "--briefed", "-o", str(tmp_path / name)]
        assert main(argv) == 0, capsys.readouterr().err
        briefings[name] = (tmp_path / name / "briefed.jsonl").read_text()
    assert briefings["bridged"] == briefings["plain"]
    assert main(["evaluate", str(tmp_path / "bridged.toml"), "--decay", "0"]) == 2
    assert "(teacher.bridge)" in capsys.readouterr().err


def test_two_processes_that_share_a_teacher_across_a_bridge_train_the_student_of_one(
    world: Path, tmp_path: Path
) -> None:
    """A rank whose responses all teach nothing still takes part in the teacher's passes."""
    changes = {
        "method": {"name": "opd"},
        "teacher": {"path": str(world / "other"), "bridge": {"longest": 1}},
        "rollout": {"num_prompts": 2, "num_rollouts": 1, "max_new_tokens": 3},
        "tokens_per_micro_batch": 16,
    }
    folders = [tmp_path / name for name in ("alone", "shared")]
    train_in = [write_run(world, folder, "ranks", **changes, parallel=parallel)
                for folder, parallel in zip(folders, ({}, {"teacher": "sharded"}), strict=True)]  # fmt: skip
    run_ranks(1, train=train_in[0], directory=folders[0])
    run_ranks(2, train=train_in[1], directory=folders[1])
    assert distance(*folders) < 1e-5


def test_a_bridged_teacher_reads_in_half_precision(world: Path, tmp_path: Path) -> None:
    half = {"dtype": "bfloat16"}
    parts = assemble(bridged(world, student=half, teacher=half), tmp_path)
    rollouts = parts.briefer.as_read("teacher", Source(parts).take(0).rollouts)
    for score in parts.teacher.score(ScoreRequest([x for x in rollouts if x is not None])):
        assert score.logprobs_T.dtype == torch.float32 and bool((score.logprobs_T <= 0).all())


def test_tokenizer_barrier_is_opd_until_ratios_leave_its_clip(world: Path, tmp_path: Path) -> None:
    """From the second update of a batch on, ratios above 1.28 or below .8 gain nothing more."""
    weights = {}
    for updates, rate in ((1, 1e-3), (2, 3e-2)):
        for name in ("opd", "tokenizer_barrier"):
            optimizer = {"num_updates": updates, "learning_rate": rate}
            run = bridged(world, method={"name": name}, optimizer=optimizer, output=str(tmp_path / f"{name} {updates}"))
            weights[name, updates] = (train(run) / "model" / "model.safetensors").read_bytes()
    assert weights["opd", 1] == weights["tokenizer_barrier", 1]
    assert weights["opd", 2] != weights["tokenizer_barrier", 2]
    assert "[teacher.bridge]" in str(explain_as_data("tokenizer_barrier"))
