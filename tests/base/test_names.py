"""A name finds code of the user's own, wherever the user stands, and says what is wrong with it in a sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.own_package.gentle.grader import Holds, holds, shortness
from tropd.base.names import find, is_name, located, made, name_of, offered, shown
from tropd.data.graders import resolve_grader
from tropd.errors import ConfigError, DataError

PACKAGE = Path(__file__).parents[1] / "own_package"
OFFERS = (
    ("methods", "gentle", "method:Gentle"),
    ("graders", "shortness", "grader:shortness"),
    ("engines", "few", "engine:FewAtATime"),
    ("policies", "opened", "policy:Opened"),
    ("probes", "sure", "probe:Sure"),
)
VALUE = "VALUE = {value!r}\ndef value(): return VALUE\n"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "is_one"),
    [
        ("package.module:Class", True),
        ("file.py:name", True),
        ("../folder/a file.py:Outer.inner", True),
        ("Qwen/Qwen3-0.6B", False),
        ("exact", False),
        ("C:\\models\\student", False),
        ("http://127.0.0.1:8000", False),
        ("a-b:c", False),
        (":c", False),
    ],
)
def test_a_name_is_told_from_a_path_an_address_and_a_word(text: str, is_one: bool) -> None:
    assert is_name(text) is is_one


def test_a_folder_that_looks_like_a_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "run:final").mkdir()
    assert not is_name("run:final")


def test_a_file_is_found_in_the_run_files_folder_and_then_in_the_current_one(tmp_path: Path) -> None:
    here, there = write(tmp_path / "mine.py", VALUE.format(value=1)), write(tmp_path / "runs/mine.py", "VALUE = 2")
    assert located("mine.py:VALUE") == f"{here}:VALUE"
    assert located("mine.py:VALUE", [tmp_path / "runs"]) == f"{there}:VALUE"
    assert located("mine:VALUE") == f"{here}:VALUE", "a module of the current folder is that file"
    assert located("json:loads") == "json:loads" and located("exact") == "exact"
    assert shown(f"{here}:VALUE") == "mine.py:VALUE"


def test_a_name_is_found_again_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "box/inner/__init__.py", "")
    write(tmp_path / "box/__init__.py", "")
    write(tmp_path / "box/inner/things.py", "from ..base import START\nthing = START + 1\n")
    write(tmp_path / "box/base.py", "START = 1\n")
    whole = located("box.inner.things:thing")
    monkeypatch.chdir("/")
    assert find(whole, "grader") == 2
    assert str(tmp_path) not in sys.path


def test_two_files_of_one_name_do_not_collide(tmp_path: Path) -> None:
    found = []
    for value in (1, 2):
        folder = tmp_path / str(value)
        write(folder / "helper.py", VALUE.format(value=value))
        write(folder / "mine.py", "from helper import value\ndef own(): return value()\n")
        write(folder / "pack/__init__.py", VALUE.format(value=value))
        found += [find(f"{folder}/mine.py:own", "method"), find(located("pack:value", [folder]), "method")]
    assert [f() for f in found] == [1, 1, 2, 2]


def test_a_file_that_was_changed_is_read_again_and_one_that_was_not_is_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.py", VALUE.format(value=1))
    first = find("mine.py:value", "method")
    assert find("mine.py:value", "method") is first
    write(path, VALUE.format(value=2))
    assert find("mine.py:value", "method")() == 2 and first() == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.py:Clas", r"grader 'mine.py:Clas': .*mine.py has no 'Clas' \(did you mean 'Class'\?\); it has Class"),
        ("mien.py:Class", r"grader 'mien.py:Class': there is no file .*mien.py \(did you mean 'mine.py'\?\)"),
        ("no.such.thing:f", r"no\.such\.thing cannot be imported \(ModuleNotFoundError: No module named 'no'\)"),
        ("broken.py:f", r"broken.py cannot be imported \(ZeroDivisionError: division by zero, broken.py line 2\)"),
        ("odd.py:f", r"odd.py cannot be imported \(SyntaxError.*line 1"),
        ("leaves.py:f", r"leaves.py cannot be imported \(SystemExit: 3"),
        ("not a name", "is no name. Give one of your own as 'package.module:name' or 'file.py:name'"),
    ],
)
def test_what_cannot_be_found_is_told_in_a_sentence(tmp_path: Path, name: str, says: str) -> None:
    write(tmp_path / "mine.py", "class Class: ...\n")
    write(tmp_path / "broken.py", "x = 1\n1 / 0\n")
    write(tmp_path / "odd.py", "def f(:\n")
    write(tmp_path / "leaves.py", "import sys\nsys.exit(3)\n")
    before = list(sys.path)
    with pytest.raises(DataError, match=says) as refusal:
        find(name, "grader", DataError)
    assert "\n" not in str(refusal.value) and sys.path == before


class Knobs:
    def __init__(self, alpha: float, beta: float = 2.0) -> None:
        if alpha < 0:
            raise ValueError("alpha is negative")
        self.alpha, self.beta = alpha, beta


@pytest.mark.parametrize(
    ("value", "knobs", "says"),
    [
        (Knobs, {"alpha": 1, "bta": 2}, r"x has no knob 'bta' \(did you mean 'beta'\?\); it has alpha, beta"),
        (Knobs, {}, "x needs alpha, which has no default"),
        (Knobs, {"alpha": -1}, "x cannot be made of {'alpha': -1}: alpha is negative"),
        (holds, {"alpha": -1}, "x is an object, which takes no knobs, but alpha was given"),
    ],
)
def test_knobs_that_do_not_fit_are_told(value: Any, knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        made(value, knobs, "x")


def test_an_object_has_the_name_that_finds_it_again() -> None:
    assert name_of(shortness) == f"{PACKAGE}/gentle/grader.py:shortness"
    assert find(str(name_of(Holds)), "grader") is Holds
    assert name_of(lambda: 1) is None and name_of(holds) is None
    assert name_of(pytest.raises) == "_pytest.raises:raises", "of an installed package by its module"


@pytest.mark.parametrize("name", ["shortness", "Holds", "holds"])
def test_a_grader_is_a_function_a_class_or_an_object_in_a_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(PACKAGE)
    for place in ("gentle.grader", "gentle/grader.py"):
        grader = resolve_grader(f"{place}:{name}")
        assert grader(["?"], ["4"], answer=["4"]) == [0.5 if name == "shortness" else 1.0]
    with pytest.raises(DataError, match="is a float. Give a function"):
        resolve_grader("gentle/bounds.py:WIDEST")


def test_installed_packages_offer_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer_gentle(tmp_path, monkeypatch)
    assert offered("methods")["gentle"].value == "gentle.method:Gentle"
    assert resolve_grader("shortness")(["?"], [""]) == [1.0]
    with pytest.raises(DataError, match="there is no grader 'shortnes' .did you mean 'shortness'"):
        resolve_grader("shortnes")


def offer_gentle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install` of the own package would leave."""
    points = "".join(f"[tropd.{kind}]\n{name} = gentle.{place}\n" for kind, name, place in OFFERS)
    write(folder / "gentle-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: gentle\nVersion: 1.0\n")
    write(folder / "gentle-1.0.dist-info/entry_points.txt", points)
    monkeypatch.syspath_prepend(str(PACKAGE))
    monkeypatch.syspath_prepend(str(folder))


def use_offers(folder: Path) -> None:
    """The same in another process, once they are written."""
    sys.path[:0] = [str(folder), str(PACKAGE)]


def test_a_file_in_a_folder_with_spaces_and_colons_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "my: graders"
    folder.mkdir()
    (folder / "own.py").write_text("def near(prompts, completions, **columns): return []\n")
    whole = located("own.py:near", [folder])
    assert whole == f"{folder / 'own.py'}:near" and is_name(whole) and shown(whole) == "own.py:near"
    assert find(whole, "grader")([], []) == []
