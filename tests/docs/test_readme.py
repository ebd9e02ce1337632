"""What README.md shows runs, and what it claims is so."""

from __future__ import annotations

import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

from tests.surface.test_imports import ROOMS
from tropd.cli.main import COMMANDS
from tropd.config.run import Run
from tropd.laboratory.demo import TESTBED, lab_of
from tropd.laboratory.runner import compare
from tropd.laboratory.tables import arms_of
from tropd.methods.explain import methods_markdown
from tropd.monitoring.records import read_records

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
ROOMS_SHOWN = re.findall(r"^      (\w+/) ", README, re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def between(name: str) -> str:
    return re.search(rf"<!-- {name}[^\n]*-->\n(.*?)<!-- /{name} -->", README, re.DOTALL).group(1)


@pytest.mark.parametrize("number", range(1, len(blocks("python"))))
def test_a_python_block_runs_as_it_stands(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"block_{number}.py"
    path.write_text(blocks("python")[number])
    torch.manual_seed(0)
    runpy.run_path(str(path))
    assert capsys.readouterr().out


def test_the_first_run_learns_and_shows_what_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "20 % of its sums" in README and "about 70 %" in README
    exec(compile(blocks("python")[0], "README.md", "exec", dont_inherit=True), {})
    records = read_records(Path("runs/first/records.jsonl"))
    assert records.header["before"]["avg@4"] == pytest.approx(0.2, abs=0.05)
    assert records.steps[-1].evaluation["avg@4"] == pytest.approx(0.7, abs=0.1)
    assert f"before training: avg@4 {records.header['before']['avg@4']:.4g} [" in capsys.readouterr().out


def test_a_run_and_a_borrowed_loss_are_said_in_python():
    run, loss = blocks("python")
    assert "train(" in run and "distillation_loss(" in loss


def test_the_run_file_is_one(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    run = Run.load(tmp_path / "run.toml", ["--method.top-k", "32"])
    assert run.method.name == "tropd" and run.method.top_k == 32


def test_the_table_of_methods_is_up_to_date():
    assert between("methods").strip() == methods_markdown().strip(), "run: python -m tropd.methods.explain --table"


def test_commands_targets_links_and_files_exist():
    for command in re.findall(r"(?:^    |`)tropd (\w+)", README, re.MULTILINE):
        assert command in COMMANDS
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^    |`)make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    named = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    named += [f"tropd/{room}" for room in ROOMS_SHOWN] + re.findall(r"`(examples/\S+)`", README)
    assert len(named) > 12
    for path in named:
        assert (ROOT / path).exists(), path


def test_folders_are_shown_as_they_import_each_other():
    assert [room for room in ROOMS if (ROOT / "tropd" / room).is_dir()] == [room.rstrip("/") for room in ROOMS_SHOWN]


def test_the_example_of_a_borrowed_loss_learns(capsys):
    spec = importlib.util.spec_from_file_location("borrow", ROOT / "examples" / "borrow.py")
    borrow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(borrow)
    gaps = borrow.main(num_steps=9)
    assert gaps[-1] < 0.9 * gaps[0]
    assert "trusted" in capsys.readouterr().out


def results() -> dict[str, float]:
    """Accuracy after training, by method."""
    rows = re.findall(r"^\| (\w[^|]+?) \| [\d.]+ \| ([\d.]+)", between("result"), re.MULTILINE)
    return {method: float(after) for method, after in rows}


def test_the_result_names_what_the_demonstration_compares():
    assert len(results()) == len(lab_of(Path("runs"), 1).methods)


@pytest.mark.slow
def test_the_result_comes_out_again(tmp_path):
    lab = lab_of(tmp_path / "demo", 3)
    found = {arm.method: sum(o.score for o in arm.best) / 3 for arm in arms_of(lab, compare(lab, workers=2), TESTBED)}
    names = {"TrOPD, beta 1, prefixes from 0.5": "TrOPD", "TrOPD, the paper's settings": "TrOPD (paper)"}
    for shown, score in results().items():
        assert found[names.get(shown, shown)] == pytest.approx(score, abs=0.05)  # other processors round otherwise
