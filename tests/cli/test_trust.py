"""Commands that only look at a run never run its code: not that of a model, not that of a grader."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.small_runs import write_models, write_run
from tropd.cli.main import main

CODE = """
from pathlib import Path
from transformers import Qwen3Config
Path({mark!r}).touch()
class OddConfig(Qwen3Config):
    model_type = "odd"
def judge(prompts, completions, **columns):
    return [1.0] * len(completions)
"""


@pytest.fixture
def run_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run file whose student, and whose grader, leave a mark when their code runs."""
    world = write_models(tmp_path / "world")
    config = world / "student" / "config.json"
    changes = {"model_type": "odd", "auto_map": {"AutoConfig": "odd_config.OddConfig"}}
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    (world / "student" / "odd_config.py").write_text(CODE.format(mark=str(tmp_path / "model ran")))
    (tmp_path / "odd_judge.py").write_text(CODE.format(mark=str(tmp_path / "grader ran")))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    student = {"path": str(world / "student"), "trust_remote_code": True}
    path = write_run(world, world / "run", "quick", student=student, grader="odd_judge:judge")
    (world / "run").mkdir()
    (world / "run" / "run.toml").write_text(path.read_text())
    return path


def test_doctor_plan_and_inspect_run_no_code_of_a_run(
    run_with_code: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_with_code.with_suffix("")
    for command in (
        ["doctor", str(run_with_code)],
        ["plan", str(run_with_code)],
        ["inspect", str(folder), "--step", "0"],
    ):
        main(command)
    assert not list(tmp_path.glob("* ran"))
    assert "odd_judge" not in sys.modules
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "is not run here. Read it, then add --trust-code" in said
    assert "'odd_judge:judge' is not imported here" in said


def test_the_doctor_runs_a_runs_code_where_the_command_line_asks_for_it(run_with_code: Path, tmp_path: Path) -> None:
    main(["doctor", str(run_with_code), "--trust-code", "--sample-prompts", "0"])
    assert (tmp_path / "model ran").exists()
