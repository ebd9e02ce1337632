"""Run files that no run can be made of."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.base.test_ranges import CASES as OUT_OF_RANGE
from tests.malformed import texts
from tests.malformed.case import Case
from tests.malformed.world import values_of, write_toml
from tropd.config.run import Run


def cases(world: Path) -> Iterator[Case]:
    for command in ("train", "doctor"):
        yield from _files(world, command)
    yield from _lines(world)
    yield from (
        _changed(world, f"number {said}", change, said.split(" = ")[0]) for said, change in OUT_OF_RANGE.items()
    )
    yield from (_changed(world, f"type of {path}", change, path) for path, change in _wrong_types(world))
    for name, (change, names) in _odd_values().items():
        yield _changed(world, name, change, names)
    yield _from_argv("a run file with a name too long", ["train", "x" * 5000 + ".toml"], "too long")
    yield _from_argv("a run file with a null in its name", ["train", "run\0.toml"], "null")
    yield _from_argv("a device as run file", ["train", "/dev/zero"], "/dev/zero")
    yield _from_argv("a folder as run file", ["plan", "/tmp"], "/tmp")
    for flag in ("--steps=9" + "9" * 5000, "--optimizer.learning-rate=nan", "--data.limit=-1", "--seed=1e9"):
        yield _flagged(world, flag)


def _files(world: Path, command: str) -> Iterator[Case]:
    deep = {
        "deep lists": texts.content(lambda whole: whole + b"\nx = " + b"[" * texts.DEEP),
        "deep tables": texts.content(lambda whole: b"x = " + b"{a=" * texts.DEEP),
        "deep keys": texts.content(lambda whole: b"a" + b".a" * texts.DEEP + b" = 1\n"),
        "deep headers": texts.content(lambda whole: b"[a" + b".a" * texts.DEEP + b"]\n"),
        "a long number": texts.content(lambda whole: b"steps = " + b"9" * 5000 + b"\n" + whole),
        "a key twice": texts.content(lambda whole: b"steps = 1\nsteps = 2\n"),
        "a table twice": texts.content(lambda whole: whole + b"\n[data]\npath = 'x'\n"),
        "a date as number": texts.content(lambda whole: b"seed = 2020-01-01\n" + whole.replace(b"seed", b"#")),
        "latin-1": texts.content(lambda whole: "output = 'é'\n".encode("latin-1") + whole),
    }
    for name, spoil in (texts.KINDS | texts.BYTES | texts.MISSING | deep).items():

        def prepare(folder: Path, spoil: texts.Spoil = spoil) -> list[str]:
            path = write_toml(folder / "run.toml", values_of(world, folder))
            spoil(path)
            return [command, str(path)]

        yield Case(name=f"run file, {name}, {command}", prepare=prepare, names="run.toml")


def _lines(world: Path) -> Iterator[Case]:
    for line, names in {
        'student = "s"': "student",
        "student = 3": "student",
        "student = []": "student",
        "[[student]]\npath = 's'": "student",
        "unknown = 1": "unknown",
        "[method]\nname = 'nobody'": "nobody",
        "[method]\nname = 3": "3",
        "method = 3": "method",
        "method = ['tropd']": "method",
        "[method]\nname = 'tropd'\nprefix = 3": "prefix",
        "[method]\nname = 'tropd'\nprefix = {shape = 'round'}": "shape",
        "[method]\nname = 'tropd'\ntropd = 3": "tropd",
        "teachers = 3": "teachers",
        "[teachers.a]\npath = 3": "teachers",
        "trackers = ['none']": "trackers",
        "trackers = 'wandb'": "trackers",
        "device = 'tpu'": "device",
    }.items():

        def prepare(folder: Path, line: str = line) -> list[str]:
            key = line.strip("[]\n").split()[0].split(".")[0].strip("[]").split("]")[0]
            values = {k: v for k, v in values_of(world, folder).items() if k != key}
            path = write_toml(folder / "run.toml", values)
            text = path.read_text()
            path.write_text(text + "\n" + line + "\n" if line.startswith("[") else line + "\n" + text)
            return ["train", str(path)]

        yield Case(name=f"run file with {line!r}", prepare=prepare, names=names)


def _changed(world: Path, name: str, change: dict[str, Any], names: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        values = values_of(world, folder)
        for section, value in change.items():
            own = values.get(section)
            values[section] = {**own, **value} if isinstance(own, dict) and isinstance(value, dict) else value
        if "method" in change and isinstance(change["method"], dict) and "name" in change["method"]:
            values["method"] = change["method"]
        return ["train", str(write_toml(folder / "run.toml", values))]

    return Case(name=name, prepare=prepare, names=names)


def _wrong_types(world: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field of a run, with a value of another type."""
    run = Run.from_dict(values_of(world, world), "test")
    for field in dataclasses.fields(Run):
        value = getattr(run, field.name)
        if dataclasses.is_dataclass(value):
            for inner in dataclasses.fields(value):
                if inner.name not in ("name", "sampling", "server", "teacher_sampling", "data", "lora", "prefix"):
                    yield f"{field.name}.{inner.name}", {field.name: {inner.name: _other(getattr(value, inner.name))}}
        elif field.name not in ("teachers",):
            yield field.name, {field.name: _other(value)}


def _other(value: Any) -> Any:
    if isinstance(value, bool | int | float):
        return "much"
    return 7 if isinstance(value, str | dict) else {"a": 1}


def _odd_values() -> dict[str, tuple[dict[str, Any], str]]:
    long, null = "x" * 5000, "a\0b"
    odd: dict[str, tuple[dict[str, Any], str]] = {}
    for field in ("student.path", "teacher.path", "data.path", "output", "student.tokenizer", "rollout.weights_folder"):
        section, _, name = field.rpartition(".")
        servers = {"servers": ["http://127.0.0.1:9"]} if section == "rollout" else {}
        for what, value in (("long", long), ("null", null), ("empty", "")):
            inner = {**servers, name: value} if section else value
            odd[f"{field} is {what}"] = ({section or name: inner}, field)
    for grader in (
        ":",
        "a:",
        ":b",
        "os:",
        "no.such.module:f",
        "json:nothing",
        "os:sep",
        "..:x",
        "json:dumps x",
        "exact\n",
    ):
        odd[f"grader {grader!r}"] = ({"grader": grader}, "grader")
    odd["grader that is too long"] = ({"grader": "a." * 5000 + ":f"}, "grader")
    for url in ("http://", "ftp://x", "http://[::1", "http://x:99999", "x", "http://a b", "http://u:p@x", "\x00"):
        odd[f"server {url!r}"] = ({"teacher": {"servers": [url], "server": {"deadline_seconds": 1.0}}}, "server")
    for key in ("", "A=B", "a\0b"):
        server = {"servers": ["http://127.0.0.1:9"], "server": {"api_key_env": key, "deadline_seconds": 1.0}}
        odd[f"a key in {key!r}"] = ({"teacher": server}, "api_key_env")
    odd["a column that is not there"] = ({"data": {"prompt_column": "\x1b[2J"}}, "prompt_column")
    odd["template arguments that nobody reads"] = ({"data": {"chat_template_kwargs": {"tokenize": 1}}}, "tokenize")
    odd["an alarm of no kind"] = ({"alarms": {"mismatch": "shout"}}, "mismatch")
    odd["targets of nothing"] = ({"student": {"lora": {"targets": []}}}, "targets")
    odd["targets that are not there"] = ({"student": {"lora": {"targets": ["nothing"]}}}, "nothing")
    return odd


def _from_argv(name: str, argv: list[str], names: str) -> Case:
    return Case(name=name, prepare=lambda folder: argv, names=names)


def _flagged(world: Path, flag: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        return ["train", str(write_toml(folder / "run.toml", values_of(world, folder))), *flag.split("=")]

    return Case(
        name=f"flag {json.dumps(flag[:40])}", prepare=prepare, names=flag.split("=")[0].strip("-").split(".")[-1][:5]
    )
