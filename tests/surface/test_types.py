"""The public names have types: a script of a user passes the strictest checks, and mistakes in it are found."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

import tropd.config.run
from tropd import Run

SCRIPT = Path(__file__).with_name("users_script.py")
SETTINGS = """
[mypy]
strict = True
[mypy-tropd.*]
follow_imports = silent
[mypy-torch.*,transformers.*,pydantic.*,tyro.*,rich.*,numpy.*]
follow_imports = skip
"""
"""Of installed packages mypy reads the types alone; those of large ones take half a minute, and are left out."""
MISTAKES = {
    "Run(studnt='s', teacher='t', data='p')": 'Unexpected keyword argument "studnt"',
    "Run(student='s', teacher='t', data='p', steps='many')": 'incompatible type "str"; expected "int"',
    "Run.load('run.toml').methd": '"Run" has no attribute "methd"',
    "train('run.toml')": 'Argument 1 to "train" has incompatible type "str"; expected "Run"',
    "TrOPD(top_q=3)": 'Unexpected keyword argument "top_q" for "TrOPD"',
}


def test_a_users_script_passes_mypy_strict_and_its_mistakes_are_found(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    (tmp_path / "script.py").write_text(SCRIPT.read_text())
    wrong = "from tropd import Run, TrOPD, train\n" + "".join(f"{line}\n" for line in MISTAKES)
    (tmp_path / "wrong.py").write_text(wrong)
    paths = os.environ | {"MYPYPATH": str(SCRIPT.parents[2])}
    command = [sys.executable, "-m", "mypy", "script.py", "wrong.py"]
    said = subprocess.run(command, cwd=tmp_path, env=paths, capture_output=True, text=True).stdout
    lines = said.splitlines()
    assert not [line for line in lines if line.startswith("script.py")], said
    for number, mistake in enumerate(MISTAKES.values(), start=2):
        assert any(line.startswith(f"wrong.py:{number}:") and mistake in line for line in lines), (mistake, said)


def test_a_users_script_passes_pyright() -> None:
    done = subprocess.run([sys.executable, "-m", "pyright", str(SCRIPT)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_constructor_that_editors_see_takes_the_fields_of_a_run() -> None:
    tree = ast.parse(inspect.getsource(tropd.config.run))
    (shown,) = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    assert {argument.arg for argument in shown.args.kwonlyargs} == {field.name for field in dataclasses.fields(Run)}
