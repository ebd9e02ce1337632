"""What README.md shows runs, and what it claims is so."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import pytest
import torch

from tropd import config_file
from tropd.cli import COMMANDS
from tropd.exact import Setting, run_all
from tropd.exact_report import markdown
from tropd.methods.explain import methods_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def between(name: str) -> str:
    return re.search(rf"<!-- {name}[^\n]*-->\n(.*?)<!-- /{name} -->", README, re.DOTALL).group(1)


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"(?<=\| )[\d.]+(?= )", text)]


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_a_python_block_runs_as_it_stands(number, tmp_path, capsys):
    path = tmp_path / f"block_{number}.py"
    path.write_text(blocks("python")[number])
    torch.manual_seed(0)
    runpy.run_path(str(path))
    assert capsys.readouterr().out


def test_a_method_is_borrowed_and_said_in_python():
    assert len(blocks("python")) == 2
    for block in blocks("python"):
        ast.parse(block)


def test_the_run_file_is_one(tmp_path):
    (block,) = blocks("toml")
    (tmp_path / "run.toml").write_text(block)
    run = config_file.load(tmp_path / "run.toml", ["--method.top-k", "32"])
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
    named += re.findall(r"^    (tropd/\S+)", README, re.MULTILINE) + re.findall(r"`(examples/\S+)`", README)
    assert len(named) > 12
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_result_has_a_mean_for_each_method_rate_and_divergence():
    assert len(numbers(between("exact"))) == 5 * 3 * 2


def test_the_example_of_a_borrowed_loss_learns(capsys):
    spec = importlib.util.spec_from_file_location("borrow", ROOT / "examples" / "borrow.py")
    borrow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(borrow)
    gaps = borrow.main(num_steps=9)
    assert gaps[-1] < 0.9 * gaps[0]
    assert "trusted" in capsys.readouterr().out


@pytest.mark.slow
def test_the_result_comes_out_again():
    """Other processors round otherwise, so a few of the sampled tokens may differ."""
    again, shown = markdown(list(run_all(Setting(), workers=2))), between("exact")
    assert again.splitlines()[0] == shown.splitlines()[0]
    assert numbers(again) == pytest.approx(numbers(shown), rel=0.1)
