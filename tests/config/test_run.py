"""A run file and flags on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tropd.config.models import ModelConfig
from tropd.config.run import Run
from tropd.config.tables import to_dict
from tropd.errors import ConfigError
from tropd.model.loading import load_tokenizer

RUN = """
[student]
path = "student"
[teacher]
path = "teacher"
[data]
path = "prompts.jsonl"
[method]
name = "tropd"
top_k = 7
"""


@pytest.fixture
def run_toml(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN)
    return path


@pytest.mark.parametrize("flags", (["--method", "eopd"], ["--method=eopd"], ["--method.name", "eopd"]))
def test_a_flag_names_another_method_which_begins_with_its_own_defaults(run_toml: Path, flags: list[str]) -> None:
    asked = Run.load(run_toml, [*flags, "--steps", "3"])
    alone = Run.from_dict(
        {"student": {"path": "s"}, "teacher": {"path": "t"}, "method": "eopd", "data": {"path": "p"}}, ""
    )
    assert asked.method == alone.method and asked.steps == 3


def test_a_flag_that_names_the_files_method_keeps_the_files_knobs(run_toml: Path) -> None:
    method = Run.load(run_toml, ["--method", "tropd", "--method.beta", "1.0"]).method
    assert (method.top_k, method.beta) == (7, 1.0)  # type: ignore[union-attr]


def test_knobs_after_the_named_method_are_its_own(run_toml: Path) -> None:
    assert Run.load(run_toml, ["--method", "aopd", "--method.top-k", "3"]).method.top_k == 3  # type: ignore[union-attr]


def test_a_method_that_is_not_known_is_refused_with_a_suggestion(run_toml: Path) -> None:
    with pytest.raises(ConfigError, match="no method 'topdd'. Did you mean 'topd'"):
        Run.load(run_toml, ["--method", "topdd"])
    with pytest.raises(ConfigError, match="wants the name of a method"):
        Run.load(run_toml, ["--method"])


def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`models/student` could be a hub id, but not where there is a folder `models`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(ConfigError, match=r"student\.path is models/student, but there is no such folder"):
        load_tokenizer(ModelConfig(path="models/student"), "student")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--student.lora.rank", "4"], ("student", {"lora": {"rank": 4, "alpha": 64}})),
        (["--student.lora.targets", "q_proj", "v_proj"], ("student", {"lora": {"targets": ["q_proj", "v_proj"]}})),
        (["--evaluation.data.path=held.jsonl"], ("evaluation", {"data": {"path": "held.jsonl"}})),
        (["--rollout.sampling.top-p", "0.9"], ("rollout", {"sampling": {"top_p": 0.9, "temperature": 1.0}})),
        (["--optimizer.learning-rate", "1e-4"], ("optimizer", {"learning_rate": 1e-4})),
    ],
)
def test_a_flag_sets_what_is_in_no_section_of_the_file(
    run_toml: Path, flags: list[str], expected: tuple[str, dict[str, Any]]
) -> None:
    section, values = expected
    found = to_dict(Run.load(run_toml, flags))[section]
    for name, value in values.items():
        assert found[name] == value if not isinstance(value, dict) else value.items() <= found[name].items()


def test_flags_alone_make_the_base_of_an_adapter_the_teacher_or_name_several(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[student]\npath = "s"\n')
    run = Run.load(path, ["--data.path", "p.jsonl", "--student.lora.rank", "2"])
    assert run.teacher.path == "base" and run.data.path == "p.jsonl"
    path.write_text('[student]\npath = "s"\n[data]\npath = "p.jsonl"\nteacher_column = "subject"\n')
    flags = ["--teachers.math.path", "m", "--teachers.code.path", "c"]
    assert {name: teacher.path for name, teacher in Run.load(path, flags).teachers.items()} == {
        "math": "m",
        "code": "c",
    }


def test_a_flag_of_no_section_is_refused_by_its_name(run_toml: Path) -> None:
    with pytest.raises(ConfigError, match="--student.lorra.rank"):
        Run.load(run_toml, ["--student.lorra.rank", "4"])


def test_the_folder_of_a_run_in_place_of_its_file_is_told(run_toml: Path) -> None:
    with pytest.raises(ConfigError, match=r"is the folder of a run. Give its file: .*run.toml"):
        Run.load(run_toml.parent)
