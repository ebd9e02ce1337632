"""A user's mistake is one plain line that names it: no box, no traceback, no second guess."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs import write_models, write_rows, write_run
from tropd.cli.main import main


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


@pytest.fixture
def folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands run: a run file, a folder of runs, a folder of pictures, a folder of files."""
    write_run(world, tmp_path / "run", "quick")
    for name in ("runs/first", "pictures", "files"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "pictures" / "cat.png").touch()
    write_rows(tmp_path / "files" / "data.jsonl", [{"prompt": "1+1=", "answer": "2"}])
    monkeypatch.chdir(tmp_path)
    return tmp_path


MISTAKES = {
    "a run that is not there": ("evaluate runs/missing", "neither a run nor a model in runs/missing: no such folder"),
    "a run that is spelled wrongly": ("evaluate runs/frist", "no such folder (did you mean 'first'?)"),
    "a run in a folder that is not there": ("evaluate gone/missing", "gone/missing is no folder here"),
    "a run that is not there, with data": ("evaluate runs/missing --data files/data.jsonl", "no such folder"),
    "a folder of pictures as data": (
        "train run.toml --data.path pictures",
        "pictures is a folder, but `datasets` saved no data set in it",
    ),
    "a folder of files as data": ("train run.toml --data.path files", "files is a folder, but `datasets` saved no"),
    "a folder of pictures as held-out data": (
        "evaluate {world}/student --data pictures --max-new-tokens 9",
        "pictures is a folder",
    ),
    "a learning rate below 0": ("train run.toml --optimizer.learning-rate -1", "optimizer.learning_rate = -1"),
    "a learning rate of 0": ("train run.toml --optimizer.learning-rate=0", "optimizer.learning_rate = 0"),
    "no samples": ("evaluate {world}/student --data files/data.jsonl --num-samples 0", "num_samples"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_plain_line(world: Path, folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    line, words = MISTAKES[what]
    assert main(line.format(world=world).split()) == 2
    said = capsys.readouterr()
    errors = [text for text in said.err.splitlines() if text.strip()]
    assert len([text for text in errors if text.startswith("error: ")]) == 1
    assert words in " ".join(said.err.split())
    assert not set("╭│╰") & set(said.err) and "above are not understood" not in said.err
    assert not any(word in said.err for word in ("Traceback", "hub:", "Generating"))
