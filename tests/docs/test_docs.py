"""What docs/ shows runs, and what it claims is so."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.small_runs import write_models
from tropd.cli.main import COMMANDS, main
from tropd.config.run import Run
from tropd.laboratory.exact import Setting, run_all
from tropd.laboratory.exact_report import markdown
from tropd.laboratory.lab import Lab, load_lab
from tropd.monitoring.records import read_records
from tropd.testbeds import TESTBEDS

ROOT = Path(__file__).parents[2]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of what is fenced."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def exact_result() -> str:
    page = (ROOT / "docs" / "exact.md").read_text()
    found = re.search(r"<!-- exact -->\n(.*?)<!-- /exact -->", page, re.DOTALL)
    assert found
    return found.group(1)


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"(?<=\| )[\d.]+(?= )", text)]


def play(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every block of a page in its order: files are written, code (that of files too) and commands run, and text is
    what the block before it prints.  The names that the code has made."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"__name__": page}
    printed = io.StringIO()
    for language, text in blocks(ROOT / "docs" / f"{page}.md"):
        if language == "text":
            assert printed.getvalue() == text
            continue
        if named := re.match(r"# (\w+\.(toml|py))\n", text):
            (folder / named[1]).write_text(text)
        if language == "toml":  # one without a name shows a section, and is read by a test below
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if language == "python":
                exec(compile(text, f"docs/{page}.md", "exec", dont_inherit=True), names)
            else:
                assert [main(shlex.split(line)[1:]) for line in text.splitlines()] == [0] * len(text.splitlines())
    return names


def test_the_tutorial_runs_from_top_to_bottom_and_prints_what_it_shows(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    write_models(tmp_path / "models")
    names = play("tutorial", tmp_path, monkeypatch)
    records = names["records"]
    assert records.header["before"]["avg@2"] < 0.3 and records.steps[-1].evaluation["avg@2"] > 0.5
    assert (tmp_path / "runs" / "short" / "model").is_dir()


def test_the_comparison_runs_and_every_key_and_testbed_is_said(tmp_path, monkeypatch):
    play("compare", tmp_path, monkeypatch)
    page = (ROOT / "docs" / "compare.md").read_text()
    for name in [*(f.name for f in dataclasses.fields(Lab)), *TESTBEDS]:
        assert re.search(rf"^\|.*`{name}`.*\|", page, re.MULTILINE), name
    for field in dataclasses.fields(Lab):
        if isinstance(field.default, int | str) and field.default:
            assert re.search(rf"^\| `{field.name}` \| `?{field.default}`? \|", page, re.MULTILINE), field.name


def test_adapters_are_trained_merged_and_scored_as_the_page_shows(tmp_path, monkeypatch):
    play("training", tmp_path, monkeypatch)
    scores = {}
    for name in ("lora", "anchored"):
        records = read_records(tmp_path / "runs" / name / "records.jsonl")
        assert records.header["before"]["avg@2"] == pytest.approx(0.16, abs=0.03)
        scores[name] = records.steps[-1].evaluation["avg@2"]
    assert scores["lora"] == pytest.approx(0.7, abs=0.15) and scores["anchored"] > 0.3


def test_parts_of_ones_own_are_trained_by_name_and_as_objects(tmp_path, monkeypatch):
    names = play("own_parts", tmp_path, monkeypatch)
    assert names["result"].mean is not None and (tmp_path / "runs/own/model").is_dir()
    assert len(read_records(names["folder"] / "records.jsonl").steps) == 3


PLAYED = ("tutorial", "compare", "training", "own_parts", "README")


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem not in PLAYED], ids=lambda p: p.name)
def test_python_blocks_of_a_page_run_in_order(page):
    names: dict[str, object] = {"__name__": page.stem}
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, page.name, "exec", dont_inherit=True), names)


def test_every_toml_block_is_a_run_or_a_comparison(tmp_path):
    found = [text for page in PAGES for language, text in blocks(page) if language == "toml"]
    assert len(found) > 2
    for text in found:
        path = tmp_path / "shown.toml"
        path.write_text(text)
        (load_lab if "methods" in tomllib.loads(text) else Run.load)(path)


def test_commands_and_links_of_every_page_exist():
    for page in PAGES:
        text = page.read_text()
        for command in re.findall(r"(?:^    |^|`)tropd ([a-z]\w+)(?=[ `\n])", text, re.MULTILINE):
            assert command in COMMANDS, f"{page.name}: tropd {command}"
        for link in re.findall(r"\]\(((?!http|#)[^)#]+)", text):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_table_of_changes_names_files_that_exist_and_hold_what_it_says():
    page = (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")
    (section,) = [part for part in page if part.startswith("I want to change")]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 25
    for wish, files, hint in rows:
        paths = [ROOT / name for name in re.findall(r"`([^`]+)`", files)]
        assert 1 <= len(paths) <= 2 and all(path.is_file() for path in paths), wish
        for name in re.findall(r"`([A-Za-z_]\w*)`", hint):
            assert any(re.search(rf"\b{name}\b", path.read_text()) for path in paths), f"{wish}: {name}"


def test_the_exact_result_has_a_mean_for_each_method_rate_and_divergence():
    assert len(numbers(exact_result())) == 5 * 3 * 2


@pytest.mark.slow
def test_the_exact_result_comes_out_again():
    """Other processors round otherwise, so a few of the sampled tokens may differ."""
    again, shown = markdown(list(run_all(Setting(), workers=2))), exact_result()
    assert again.splitlines()[0] == shown.splitlines()[0]
    assert numbers(again) == pytest.approx(numbers(shown), rel=0.1)
