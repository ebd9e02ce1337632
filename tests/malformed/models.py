"""Folders that hold no model, or no tokenizer, that could be read."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.malformed import texts
from tests.malformed.case import Case
from tests.malformed.world import copied, values_of, write_toml

NUMBERS: dict[str, Any] = {
    "hidden_size": ["x", -1, 0, 2**40, None, []],
    "num_hidden_layers": ["x", -1, 0, 3.5, 10**8],
    "num_attention_heads": ["x", 0, -4, 3],
    "num_key_value_heads": [0, 5, "x"],
    "vocab_size": [0, -1, "x", 2**50],
    "intermediate_size": [-1, "x"],
    "max_position_embeddings": ["x"],
    "model_type": ["nobody", 3, [], ""],
    "rms_norm_eps": ["x"],
    "hidden_act": ["nothing", 3],
    "dtype": ["float1"],
}
"""Of config.json."""

TEMPLATES: dict[str, str] = {
    "loops in loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a range too large": "{% for a in range(999999999999) %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a long text": "{{ 'a' * 99999999999999 }}",
    "texts that double": "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(99) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "output without end": "{% for a in range(99999) %}{% for b in range(99999) %}{{ 'abcdefgh' }}{% endfor %}"
    "{% endfor %}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "attributes": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('true') }}",
    "a syntax error": "{% for m in messages %}",
    "a name that is not there": "{{ nothing.at.all }}",
    "a file": "{% include '/etc/passwd' %}",
    "brackets": "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "a filter that is not there": "{{ messages | nothing }}",
    "a division by zero": "{{ 1 // 0 }}",
    "nothing at all": "{% if false %}x{% endif %}",
}


def cases(world: Path) -> Iterator[Case]:
    weights = {
        **texts.BYTES,
        **texts.KINDS,
        **texts.MISSING,
        "header too long": texts.content(lambda whole: struct.pack("<Q", 2**60) + whole[8:]),
        "header beyond the file": texts.content(lambda whole: struct.pack("<Q", len(whole) * 2) + whole[8:]),
        "header that is no JSON": texts.content(lambda whole: whole[:8] + b"x" * (len(whole) - 8)),
        "header of another kind": texts.content(lambda whole: struct.pack("<Q", 4) + b"[{}]"),
        "header alone": texts.content(lambda whole: whole[: 8 + struct.unpack("<Q", whole[:8])[0]]),
        "one byte short": texts.content(lambda whole: whole[:-1]),
        "one byte long": texts.content(lambda whole: whole + b"\0"),
        "deep header": texts.content(lambda _: struct.pack("<Q", texts.DEEP) + b"[" * texts.DEEP),
    }
    for whose in ("student", "teacher"):
        for name, spoil in weights.items():
            yield _spoilt(world, whose, "model.safetensors", name, spoil)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        wrong = texts.BYTES | texts.KINDS | texts.JSON
        wrong |= texts.MISSING if file == "config.json" else {}
        for name, spoil in wrong.items():
            yield _spoilt(world, "student", file, name, spoil)
    for field, values in NUMBERS.items():
        for value in values:
            yield _spoilt(
                world, "student", "config.json", f"{field} = {value!r}", _json_with({field: value}), "student"
            )
    for name, template in TEMPLATES.items():
        yield _templated(world, name, template)
    for change in (
        {"chat_template": 3},
        {"chat_template": {"a": 1}},
        {"chat_template": [{"name": 1}]},
        {"eos_token": 3},
        {"eos_token": {"a": 1}},
        {"tokenizer_class": 3},
        {"added_tokens_decoder": 3},
        {"model_max_length": "x"},
    ):
        names = "template" if "chat_template" in change else "tokenizer"
        yield _spoilt(world, "student", "tokenizer_config.json", str(change), _json_with(change), names)
    for path in ("model", "model.vocab", "added_tokens", "pre_tokenizer", "decoder"):
        for value in (3, "x", [[]]):
            yield _spoilt(world, "student", "tokenizer.json", f"{path} = {value!r}", _json_at(path, value), "tokenizer")


def _json_with(change: dict[str, Any]) -> texts.Spoil:
    spoil = texts.content(lambda whole: json.dumps({**json.loads(whole), **change}).encode())

    def alone(path: Path) -> None:
        spoil(path)
        if "chat_template" in change:  # a file of its own comes before what is said here
            (path.parent / "chat_template.jinja").unlink()

    return alone


def _json_at(path: str, value: Any) -> texts.Spoil:
    def change(whole: bytes) -> bytes:
        values = place = json.loads(whole)
        *before, last = path.split(".")
        for name in before:
            place = place[name]
        place[last] = value
        return json.dumps(values).encode()

    return texts.content(change)


def _spoilt(world: Path, whose: str, file: str, name: str, spoil: texts.Spoil, names: str = "") -> Case:
    return _with(world, whose, f"{whose}, {file}, {name}", lambda folder: spoil(folder / file), names or whose)


def _templated(world: Path, name: str, template: str) -> Case:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        (folder / "chat_template.jinja").write_text(template)

    return _with(world, "student", f"chat template, {name}", write, "template")


def _with(world: Path, whose: str, name: str, change: Callable[[Path], None], names: str) -> Case:
    def prepare(folder: Path) -> list[str]:
        model = copied(world / whose, folder / whose)
        change(model)
        return [
            "train",
            str(write_toml(folder / "run.toml", values_of(world, folder, **{whose: {"path": str(model)}}))),
        ]

    return Case(name=name, prepare=prepare, names=names)
