"""Data that no prompts, rollouts or comparisons can be made of."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.malformed import texts
from tests.malformed.case import Case
from tests.malformed.world import values_of, write_toml

ROW = b'{"prompt": "1+1=", "answer": "2"}\n'

LINES: dict[str, tuple[bytes, str]] = {
    "a line cut short": (ROW + ROW[:20], "line 2"),
    "a list as row": (ROW + b"[1]\n", "line 2"),
    "a deep list": (ROW + b"[" * texts.DEEP + b"\n", "line 2"),
    "a deep object": (ROW + b'{"prompt":' * texts.DEEP + b"\n", "line 2"),
    "a key twice": (b'{"prompt": "a", "prompt": "b", "answer": "1"}\n', "twice"),
    "a long number": (b'{"prompt": "a", "answer": ' + b"9" * 5000 + b"}\n", "line 1"),
    "not a number": (b'{"prompt": "a", "answer": NaN}\n', "NaN"),
    "infinity": (b'{"prompt": "a", "answer": -Infinity}\n', "Infinity"),
    "latin-1": (b'{"prompt": "\xe9", "answer": "1"}\n', "line 1"),
    "nulls between rows": (ROW + b"\0\0\0\n", "line 2"),
}
"""Of a .jsonl file, and what the refusal names."""

ROWS: dict[str, tuple[Any, str]] = {
    "a lone surrogate in a prompt": ({"prompt": "a\ud800b", "answer": "1"}, "surrogate"),
    "a lone surrogate in an answer": ({"prompt": "a", "answer": "\udfff"}, "surrogate"),
    "a lone surrogate in another column": ({"prompt": "a", "answer": "1", "c": {"d": ["\ud800"]}}, "surrogate"),
    "a lone surrogate as column": ({"prompt": "a", "answer": "1", "\ud800": 1}, "surrogate"),
    "a number as prompt": ({"prompt": 3, "answer": "1"}, "prompt"),
    "an object as prompt": ({"prompt": {"a": 1}, "answer": "1"}, "prompt"),
    "an empty list as prompt": ({"prompt": [], "answer": "1"}, "prompt"),
    "a list of numbers as prompt": ({"prompt": [1, 2], "answer": "1"}, "message 1"),
    "a role that is a number": ({"prompt": [{"role": 1, "content": "a"}], "answer": "1"}, "role"),
    "a content of numbers": ({"prompt": [{"role": "user", "content": [1]}], "answer": "1"}, "message 1"),
    "a surrogate in a message": ({"prompt": [{"role": "user", "content": "\ud800"}], "answer": "1"}, "surrogate"),
    "a surrogate as role": ({"prompt": [{"role": "\ud800", "content": "a"}], "answer": "1"}, "surrogate"),
    "an answer that is a list": ({"prompt": "a", "answer": [1]}, "answer"),
    "an answer that is an object": ({"prompt": "a", "answer": {}}, "answer"),
    "spaces": ({"prompt": "  \n ", "answer": "1"}, "prompt"),
    "nothing": ({"prompt": None, "answer": "1"}, "prompt"),
    "no column": ({"question": "a", "answer": "1"}, "prompt"),
    "no answer": ({"prompt": "a"}, "answer"),
}
"""A row that makes no prompt, and what the refusal names."""


def cases(world: Path) -> Iterator[Case]:
    for name, (content, names) in LINES.items():
        for command in ("train", "doctor"):
            yield _data(world, f"data, {name}, {command}", "data.jsonl", content, names, command)
        yield _data(world, f"data, {name}, lazily", "data.jsonl", content, names, "train", streaming=True)
    for name, (row, names) in ROWS.items():
        yield _data(world, f"data, {name}", "data.jsonl", (json.dumps(row) + "\n").encode(), names, "train")
    for name, spoil in (texts.KINDS | texts.BYTES | texts.JSON).items():
        for suffix in ("jsonl", "json", "parquet"):
            yield _spoilt(world, f"data.{suffix}, {name}", f"data.{suffix}", spoil)
    for path in ("/tmp", "/dev/zero", "/dev/random", "/", "no/such/file.jsonl", "nobody/nothing", "x" * 300 + ".jsonl"):
        yield _at(world, path)
    for mark in ("state.json", "dataset_dict.json"):
        for name in ("empty", "zeros", "cut", "deep", "list", "number"):
            spoil = (texts.BYTES | texts.JSON)[name]
            yield _saved(world, f"saved data, {mark}, {name}", mark, spoil)
    yield from _scores(world)
    yield from _labs()


def _doing(world: Path, command: str, folder: Path, data: dict[str, Any]) -> list[str]:
    return [command, str(write_toml(folder / "run.toml", values_of(world, folder, data=data)))]


def _data(world: Path, name: str, file: str, content: bytes, names: str, command: str, **knobs: Any) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / file).write_bytes(content)
        return _doing(world, command, folder, {"path": str(folder / file), "on_bad_row": "refuse", **knobs})

    return Case(name=name, prepare=prepare, names=names)


def _spoilt(world: Path, name: str, file: str, spoil: texts.Spoil) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / file).write_bytes(ROW * 3)
        spoil(folder / file)
        return _doing(world, "train", folder, {"path": str(folder / file), "on_bad_row": "refuse"})

    return Case(name=name, prepare=prepare, names=file)


def _at(world: Path, path: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        return _doing(world, "train", folder, {"path": path})

    return Case(name=f"data at {path[:30]}", prepare=prepare, names=path if len(path) < 256 else "too long")


def _saved(world: Path, name: str, mark: str, spoil: texts.Spoil) -> Case:
    def prepare(folder: Path) -> list[str]:
        (folder / "saved").mkdir()
        (folder / "saved" / mark).write_text('{"splits": ["train"], "_data_files": []}')
        spoil(folder / "saved" / mark)
        return _doing(world, "train", folder, {"path": str(folder / "saved")})

    return Case(name=name, prepare=prepare, names="saved")


def _scores(world: Path) -> Iterator[Case]:
    line = json.dumps(_rollout()) + "\n"
    wrong: dict[str, bytes] = {
        "nothing": b"",
        "a torn line": line.encode()[:-40],
        "another kind": b'{"a": 1}\n',
        "ids beyond the vocabulary": json.dumps(_rollout(token_ids=[1, 10**6])).encode() + b"\n",
        "negative ids": json.dumps(_rollout(token_ids=[1, -5])).encode() + b"\n",
        "ids that are no numbers": json.dumps(_rollout(token_ids=["a", "b"])).encode() + b"\n",
        "authors that are nobody": json.dumps(_rollout(authors=[0, 9])).encode() + b"\n",
        "numbers of another length": json.dumps(_rollout(behavior_logprobs=[0.0])).encode() + b"\n",
        "no prompt": json.dumps({**_rollout(), "prompt": None}).encode() + b"\n",
        "a surrogate": json.dumps(_rollout(id="\ud800")).encode() + b"\n",
        "a deep line": b"[" * texts.DEEP + b"\n",
        "noise": os.urandom(1000),
    }
    for name, content in wrong.items():

        def prepare(folder: Path, content: bytes = content) -> list[str]:
            (folder / "rollouts.jsonl").write_bytes(content)
            run = write_toml(folder / "run.toml", values_of(world, folder))
            return ["score", str(run), str(folder / "rollouts.jsonl"), "-o", str(folder / "scored.jsonl")]

        names = "token id 1000000" if "beyond" in name else "rollouts.jsonl"
        yield Case(name=f"rollouts to score, {name}", prepare=prepare, names=names)
    for name, spoil in texts.KINDS.items():

        def prepare_kind(folder: Path, spoil: texts.Spoil = spoil) -> list[str]:
            spoil(folder / "rollouts.jsonl")
            run = write_toml(folder / "run.toml", values_of(world, folder))
            return ["score", str(run), str(folder / "rollouts.jsonl"), "-o", str(folder / "scored.jsonl")]

        yield Case(name=f"rollouts to score, {name}", prepare=prepare_kind, names="rollouts.jsonl")


def _rollout(**changes: Any) -> dict[str, Any]:
    ids = changes.get("token_ids", [1, 2])
    return {
        "id": "a/0/0",
        "prompt": {"id": "a", "token_ids": [ids[0]], "messages": [], "response_ids": [], "columns": {}},
        "token_ids": ids,
        "authors": [0, 1],
        "behavior_logprobs": [0.0, -1.0],
        "model_logprobs": [0.0, -1.0],
        "finish": "length",
        **changes,
    }


def _labs() -> Iterator[Case]:
    whole = b'output = "x"\ntestbeds = ["embedded/nano"]\n[methods.a]\nname = "opd"\n'
    wrong = {
        "no methods": texts.content(lambda _: b'output = "x"\ntestbeds = ["embedded/nano"]\nmethods = {}\n'),
        "no such testbed": texts.content(lambda _: whole.replace(b"embedded/nano", b"embedded/\\u0007")),
        "deep": texts.content(lambda _: b"x = " + b"[" * texts.DEEP),
    }
    for name, spoil in (texts.KINDS | texts.BYTES | texts.MISSING | wrong).items():

        def prepare(folder: Path, spoil: texts.Spoil = spoil) -> list[str]:
            (folder / "lab.toml").write_bytes(whole)
            spoil(folder / "lab.toml")
            return ["compare", str(folder / "lab.toml"), "--no-figures"]

        yield Case(
            name=f"lab, {name}",
            prepare=prepare,
            names={"no methods": "methods", "no such testbed": "testbed"}.get(name, "lab.toml"),
        )
