"""Folders of runs in which something is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.malformed import texts
from tests.malformed.case import Case
from tests.malformed.world import spoilt

NEWEST = "checkpoints/step_000002"


def cases(world: Path) -> Iterator[Case]:
    run, stopped, adapter = world / "run", world / "stopped", world / "adapter"
    every = texts.BYTES | texts.KINDS | texts.MISSING
    for name, spoil in (every | texts.JSON).items():
        for command in (["export", "COPY", "-o", "FOLDER/out"], ["resume", "COPY"]):
            yield spoilt(f"state.json, {name}, {command[0]}", run, f"{NEWEST}/state.json", spoil, command)
    for file in ("weights.safetensors", "optimizer.safetensors", "run.toml"):
        for name, spoil in every.items():
            yield spoilt(f"checkpoint's {file}, {name}", run, f"{NEWEST}/{file}", spoil, ["resume", "COPY"])
    inspect = ["inspect", "COPY", "--step", "1"]
    for name, spoil in every.items():
        for command in (["resume", "COPY"], ["report", "COPY"], inspect, ["launch", "COPY", "--print"]):
            names = "run" if command[0] == "launch" and name in ("missing", "loop") else "run.toml"
            told = command[0] == "report"
            yield spoilt(f"run.toml, {name}, {command[0]}", run, "run.toml", spoil, command, names, told=told)
    for name, spoil in (every | texts.JSON).items():
        for command in (["report", "COPY"], inspect):
            told = command[0] == "report" or name in ("cut", "missing", "loop")
            yield spoilt(f"records, {name}, {command[0]}", run, "records.jsonl", spoil, command, told=told)
    for name, line in RECORDS.items():
        yield spoilt(
            f"records, {name}", run, "records.jsonl", _line(line), ["report", "COPY"], "records.jsonl", told=True
        )
    for name, spoil in every.items():
        file = "rollouts/step_000001.parquet"
        yield spoilt(f"rollouts, {name}", run, file, spoil, ["inspect", "COPY", "--step", "1"], "step")
    (kept,) = (stopped / "batches").iterdir()
    for file in ("tokens.safetensors", "rollouts.jsonl"):
        for name, spoil in every.items():
            yield spoilt(
                f"kept {file}, {name}",
                stopped,
                f"batches/{kept.name}/{file}",
                spoil,
                ["inspect", "COPY", "--step", str(int(kept.name.removeprefix("step_")))],
                kept.name,
            )
    for name, spoil in (every | texts.JSON).items():
        command = ["merge", "COPY", "-o", "FOLDER/out"]
        yield spoilt(
            f"adapter_config.json, {name}", adapter / "model", "adapter_config.json", spoil, command, "adapter"
        )
    for name, spoil in every.items():
        command = ["evaluate", "COPY", "--data", str(world / "data.jsonl"), "-o", "FOLDER/out"]
        yield spoilt(f"adapter_model, {name}", adapter / "model", "adapter_model.safetensors", spoil, command, "model")
    yield from _commands(run)


def _commands(run: Path) -> Iterator[Case]:
    for argv, names in (
        (["report", "/tmp"], "/tmp"),
        (["inspect", "/dev/zero", "--step", "1"], "/dev/zero"),
        (["inspect", "COPY", "--step", "-1"], "step"),
        (["inspect", "COPY", "--step", "9" * 30], "step"),
        (["inspect", "COPY", "--step", "9" * 5000], "step"),
        (["inspect", "COPY", "--step", "1", "--worst", "-3"], "worst"),
        (["export", "COPY", "--step", "-1", "-o", "FOLDER/out"], "-1"),
        (["export", "COPY", "-o", "x" * 300], "xxx"),
        (["export", "COPY", "-o", "a\0b"], "null"),
        (["evaluate", "COPY", "--data", "/dev/zero"], "/dev/zero"),
        (["evaluate", "COPY", "--num-samples", "0"], "num_samples"),
        (["evaluate", "COPY", "--grader", ":"], "grader"),
        (["evaluate", "COPY", "--dtype", "nothing"], "dtype"),
        (["resume", "x" * 5000], "xxx"),
        (["resume", "a\0b"], "null"),
        (["report", "COPY", "--transcripts", "-1"], "transcripts"),
        (["watch", "COPY", "--port", "99999999"], "port"),
        (["score", "COPY/run.toml", "COPY/none.jsonl", "-o", "FOLDER/s"], "none.jsonl"),
        (["nothing"], "nothing"),
        (["launch", "COPY", "--print", "--processes", "0"], "processes"),
    ):
        yield spoilt(f"command {' '.join(argv)[:60]!r}", run, "run.toml", lambda path: None, argv, names)


RECORDS: dict[str, Any] = {
    "a deep line": b"[" * texts.DEEP,
    "a deep object": b'{"kind":' * texts.DEEP,
    "noise": bytes(range(14, 256)) * 3,
    "a step before": b'{"kind": "step", "step": -5}',
    "a huge step": json.dumps({"kind": "step", "step": 10**30}).encode(),
    "another kind": b'{"kind": "stop"}',
    "a deep pointer": json.dumps({"kind": "step", "step": 2, "nonfinite": {"/a" * 999: "nan"}}).encode(),
    "a pointer to nowhere": json.dumps({"kind": "step", "step": 2, "nonfinite": 3}).encode(),
    "a surrogate": b'{"kind": "step", "step": 2, "method": "\\ud800"}',
    "a number as text": b'{"kind": "step", "step": "2"}',
    "infinity": b'{"kind": "step", "step": 2, "loss": Infinity}',
    "a long number": b'{"kind": "step", "step": ' + b"9" * 5000 + b"}",
}


def _line(line: bytes) -> texts.Spoil:
    return texts.content(lambda whole: whole + line + b"\n")
