"""Files of others are read with care, and what is wrong with them is one sentence with the file's name."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tropd.base.reading import check_path, parse_json, parse_toml, printable, read_bytes, read_lines, read_text
from tropd.base.terminal import PrintableConsole
from tropd.cli.main import main
from tropd.data import template
from tropd.data.template import check_template, limited
from tropd.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.symlink_to(path.name), "Too many levels"),
        (lambda path: None, "No such file"),
    ],
)
def test_only_regular_files_are_opened(make: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(DataError, match=f"x cannot be read: .*{said}"):
        read_bytes(tmp_path / "x", DataError)


def test_a_file_that_is_too_large_or_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\xef\xbb\xbfab\xff")
    with pytest.raises(ConfigError, match="not UTF-8 text: it holds bytes that are none at byte 5"):
        read_text(path)
    with pytest.raises(ConfigError, match="more than 3 bytes"):
        read_bytes(path, limit=3)
    path.write_bytes(b"\xef\xbb\xbfab")
    assert read_text(path) == "ab"


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "/".join(["x" * 200] * 30)])
def test_a_name_that_no_file_can_have_is_refused_before_it_is_used(path: str) -> None:
    with pytest.raises(ConfigError, match="data.path is .*(null|too long)"):
        check_path(path, "data.path")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "it says 'a' twice"),
        ("NaN", "NaN is no number"),
        ("[" * 100_000, "more than 100 deep"),
        ("[" * 101 + "]" * 101, "more than 100 deep"),
        ('"\\ud800"', "lone surrogate"),
        ('{"\\udfff": 1}', "lone surrogate"),
        ("9" * 5000, "Exceeds the limit"),
        ("{", "is not JSON"),
    ],
)
def test_json_that_is_read_in_two_ways_or_without_end_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"the text .*{said}"):
        parse_json(text.encode(), "the text")


def test_json_that_means_one_thing_passes() -> None:
    text = '{"a": [1, 2.5, null, "\\ud83d\\ude00 [[[["], "b": ' + "[" * 98 + "]" * 98 + "}"
    assert parse_json(text.encode(), "the text")["a"] == [1, 2.5, None, "\U0001f600 [[[["]
    assert parse_json(b'{"a": 1, "a": 2}', "the text", unique=False) == {"a": 2}


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "[a" + ".a" * 100_000 + "]", "a = {b" + ".b" * 200 + " = 1}"])
def test_toml_that_nests_without_end_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="100"):
        parse_toml(text, "the text")


def test_lines_are_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"a\nb\n\nc")
    assert list(read_lines(tmp_path / "x")) == [(1, b"a\n"), (2, b"b\n"), (3, b"\n"), (4, b"c")]


def test_a_terminal_gets_no_control_characters_from_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printable("a\x1b[2J\n\x07\ud800é") == "a\\x1b[2J\\n\\x07\\ud800é"
    PrintableConsole().print("a\x1b[2J[bold]b", style="red")
    assert main(["train", "no\x1b[2Jsuch.toml"]) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err and said.out.startswith("a\\x1b[2Jb")


def test_a_power_is_refused_in_a_template_and_arguments_are_not() -> None:
    for text in ("{{ 9 ** 9 }}", "{% set x = a **b %}", "{{ (9)**9 }}"):
        with pytest.raises(ConfigError, match="power"):
            check_template(text)
    for text in ("{{ dict(**a) }}", "{{ f(1, ** a) }}", "{{ '9 ** 9' }} ** text", "{% generation %}{{ '**' }}"):
        check_template(text)
    with pytest.raises(ConfigError, match="power"):
        check_template({"default": "", "tools": "{{ 2 ** 9 }}"})


def test_what_a_template_does_without_end_is_ended_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.1)
    found: list[str] = []

    def work() -> None:
        try:
            with limited():
                while True:
                    pass
        except ConfigError as error:
            found.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    work()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4 and "more than 0.1 s" in found[0]


def test_a_template_that_takes_memory_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "BYTES", 2**25)
    with pytest.raises(ConfigError, match="memory"), limited():
        held = []
        while True:
            held.append(b"x" * 2**16)
