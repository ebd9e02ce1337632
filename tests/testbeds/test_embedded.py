"""The models that come with the package are small, ready, and as good as they are said to be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.testbeds.test_pair import contents, hurried
from tropd.errors import ConfigError
from tropd.testbeds import TESTBEDS, embedded
from tropd.testbeds.embed import embed
from tropd.testbeds.pair import EMBEDDED, load, measure

NAMES = ["nano-mild", "nano-hard"]


def test_together_they_take_less_than_a_megabyte() -> None:
    sizes = {path: path.stat().st_size for path in EMBEDDED.rglob("*") if path.is_file()}
    assert sum(size for path, size in sizes.items() if path.suffix == ".safetensors") > 3 * 86_336 * 2
    assert sum(sizes.values()) < 1_000_000


@pytest.mark.parametrize("name", NAMES)
def test_the_teacher_solves_the_prompts_and_the_student_could(name: str) -> None:
    pair, bed = embedded(name), TESTBEDS[name]
    measured = {
        f"{whose}_{fact}": value
        for whose, folder in (("teacher", pair.teacher), ("student", pair.student))
        for fact, value in measure(bed, load(folder), EMBEDDED).items()
    }
    assert measured == pytest.approx(pair.facts, abs=0.02)
    assert measured["teacher_accuracy"] >= 0.95 and 0.15 <= measured["student_accuracy"] <= 0.35
    assert measured["teacher_parameters"] == measured["student_parameters"] == 86_336


@pytest.mark.parametrize("name", NAMES)
def test_student_and_teacher_have_one_vocabulary_and_the_prompts_are_the_tasks(name: str) -> None:
    pair = embedded(name)
    files = [(folder / "tokenizer.json").read_bytes() for folder in (pair.teacher, pair.student)]
    assert files[0] == files[1]
    for path, num in ((pair.prompts, 512), (pair.held_out, 256)):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert len({row["prompt"] for row in rows}) == num
        assert all(int(row["answer"][1:]) == eval(row["prompt"][:-1]) % 5 for row in rows)


def test_what_does_not_come_with_the_package_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="'main-hard' does not come with the package; nano-mild, nano-hard do"):
        embedded("main-hard")


def test_the_script_writes_the_same_files_again(tmp_path: Path) -> None:
    beds = [hurried("nano-mild"), hurried("nano-hard")]
    embed(beds, 0, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b" / "old").write_text("goes")
    embed(beds, 0, tmp_path / "b")
    first, again = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first == again
    assert {path.relative_to(EMBEDDED).as_posix() for path in EMBEDDED.rglob("*") if path.is_file()} == first.keys()
