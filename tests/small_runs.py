"""Small real runs on disk: two tiny models, sums to learn, and the run that ties them together.

    folder = write_models(tmp_path)                      student, teacher and three data sets, which runs only read
    run = run_of(folder, {"name": "opd"}, steps=1)       a run for this process
    path = write_run(folder, tmp_path / "run", "lora")   the file of a run for a process of its own

Tables in `changes` are merged key by key; one with a `name`, such as a method, is taken whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer, tiny_model
from tropd.base.fast_paths import FastPath as P
from tropd.config.run import Run

NEW_TOKENS = 28
"""Enough for the decoder."""
TROPD = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 0.4}, "beta": 0.1}

SHORT: dict[str, Any] = {
    "steps": 3,
    "grader": "exact",
    "device": "cpu",
    "tokens_per_micro_batch": 128,
    "data": {"path": "data.jsonl"},
    "student": {"path": "student"},
    "teacher": {"path": "teacher"},
    "method": TROPD,
    "rollout": {"num_prompts": 3, "num_rollouts": 2, "max_new_tokens": NEW_TOKENS, "save_every": 1},
    "optimizer": {"learning_rate": 1e-3},
    "checkpoint": {"every": 1, "keep": 9},
    "alarms": {"support_collapse": "off"},
}

STOPPED: dict[str, Any] = {
    "device": "auto",
    "steps": 6,
    "tokens_per_micro_batch": 160,
    "tile_tokens": 40,
    "data": {"path": "four.jsonl"},
    "method": {"name": "tropd", "top_k": 8, "beta": 0.1},
    "rollout": {"save_every": 2},
    "evaluation": {"every": 3, "num_samples": 2, "max_new_tokens": 20, "data": {"path": "four.jsonl", "limit": 2}},
    "checkpoint": {"every": 2, "keep": 2},
}
"""A run to be stopped, killed and continued, which takes fast paths: tiles of 40 tokens cut every batch, prompts differ
in length so that spans pay, and of four prompts, three a step, the second epoch begins inside the second step."""

WIDE = {"student": {"path": "wide student"}, "teacher": {"path": "wide teacher"}}
CASES: dict[str, dict[str, Any]] = {
    "tropd": {},
    "entropy": {"method": {"name": "entropy_opd"}, "rollout": {"max_new_tokens": 70, "max_batch": 4}},
    "lora": {"student": {"lora": {"rank": 4, "alpha": 8, "dropout": 0.2}}, "teacher": {"path": "base"}},
    "updates": {"optimizer": {"num_updates": 2, "schedule": "cosine", "warmup_steps": 2}},
    "streaming": {"data": {"streaming": True}, "tile_vocab": 100},
    "bfloat16": {"student": {"dtype": "bfloat16"}, "optimizer": {"learning_rate": 1e-5}},
    "dense": {"method": {"name": "minillm"}},
    "wide": {
        **WIDE,
        "method": {"name": "full_fkl", "top_k": 8},
        "rollout": {"num_rollouts": 4},
        "tokens_per_micro_batch": 1000,
        "tile_tokens": 512,
    },
}
"""The runs that are stopped, killed and continued: what each changes in STOPPED."""

ALWAYS = {P.DECODER, P.SHARED_PROMPTS}
TEXTS = {P.KEPT_TEXTS}
HEAD = {P.FUSED_HEAD, P.FUSED_READ, P.SEVERAL_TILES}
TAKES: dict[str, set[P]] = {
    "tropd": ALWAYS | TEXTS | HEAD | {P.SPANS, P.SOME_TOP_K},
    "entropy": ALWAYS | HEAD | {P.REFILLED_BATCH, P.GROWN_CACHE, P.LIVE_ROWS},
    "lora": ALWAYS | TEXTS | HEAD | {P.SPANS},
    "updates": ALWAYS | TEXTS | HEAD | {P.SPANS},
    "streaming": ALWAYS | TEXTS | {P.SPANS, P.LEAN_HEAD, P.LEAN_READ, P.SEVERAL_TILES},
    "bfloat16": ALWAYS | TEXTS | HEAD | {P.PEAKS, P.ROUNDED_IN_PLACE},
    "dense": ALWAYS | {P.DENSE_HEAD, P.SEVERAL_TILES},
    "wide": ALWAYS | {P.PACKED_MATRICES, P.FUSED_HEAD, P.SOFTMAX_IN_PARTS, P.SUPPORTS_IN_PARTS, P.COLUMNS},
}
"""The fast paths that each case has to take: a run that took another path proves nothing about this one."""


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    whole = copy.deepcopy(dict(base))
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(whole.get(name), dict) and "name" not in value
        whole[name] = merged(whole[name], value) if both else value
    return whole


KINDS: dict[str, dict[str, Any]] = {
    "short": SHORT,
    "quick": merged(
        SHORT,
        {
            "steps": 2,
            "tokens_per_micro_batch": 256,
            "method": {"name": "tropd", "top_k": 8, "beta": 0.1},
            "rollout": {"num_prompts": 2, "max_new_tokens": 12},
        },
    ),
    **{case: merged(merged(SHORT, STOPPED), changes) for case, changes in CASES.items()},
    # Five prompts for two or four processes: some ranks have more micro-batches than others.
    "ranks": merged(
        merged(SHORT, STOPPED),
        {
            "steps": 3,
            "data": {"path": "many.jsonl"},
            "rollout": {"num_prompts": 5, "save_every": 1},
            # AdamW divides by the gradient's own size: this epsilon keeps rounding errors from becoming steps.
            "optimizer": {"learning_rate": 1e-2, "epsilon": 1e-2},
            "evaluation": {"every": 3, "data": {"limit": 3}},
            "checkpoint": {"every": 1, "keep": 9},
        },
    ),
}
"""Whole runs by name, before anything is changed in them.  Paths are those inside the folder of `write_models`."""


def save_model(folder: Path, model: Any = None, tokenizer: Any = None, **options: Any) -> Path:
    """A checkpoint of transformers with its tokenizer; a tiny model with these options unless one is given."""
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    model = tiny_model(**{"tied": True, **options}) if model is None else model
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_models(folder: Path, family: str = "qwen3", teacher: Any = None, **options: Any) -> Path:
    """Student, teacher and data sets; the teacher is another random model unless one is given."""
    save_model(folder / "student", family=family, seed=0, **options)
    save_model(folder / "teacher", teacher, family=family, seed=1, **options)
    plain = [{"prompt": f"{a}+{b}" + "=" * (1 + a), "answer": str(a + b)} for a in range(5) for b in range(4)]
    write_rows(folder / "data.jsonl", plain)
    for name, size in (("four", 2), ("many", 7)):
        rows = [
            {"prompt": "sum " * (2 * a + b) + f"{a}+{b}=", "answer": str(a + b), "kind": ("even", "odd")[b % 2]}
            for a in range(size)
            for b in range(size)
        ]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def write_wide_models(folder: Path) -> None:
    """A head of 2^20 weights and more, all of whose rows are tokens, over layers of 2^15 and more."""
    for name, seed in (("wide student", 0), ("wide teacher", 1)):
        save_model(folder / name, tokenizer=byte_tokenizer(vocab=2**13), seed=seed, width=128, vocab=2**13, sharp=8.0)


def values_of(folder: Path, kind: str = "short", **changes: Any) -> dict[str, Any]:
    """The values of a run's file.  The run's folder is `run` beside the models unless `changes` say `output`."""
    values = copy.deepcopy(KINDS[kind])
    for part in (values["student"], values["teacher"], values["data"], values.get("evaluation", {}).get("data", {})):
        if part and part["path"] not in ("base", "start"):
            part["path"] = str(folder / part["path"])
    return merged({"output": str(folder / "run"), **values}, changes)


def run_of(folder: Path, method: Mapping[str, Any] | None = None, *, kind: str = "short", **changes: Any) -> Run:
    """A run on the models in a folder, with this method or with that of its kind."""
    chosen = {} if method is None else {"method": {"name": "tropd", **method}}
    return Run.from_dict(values_of(folder, kind, **chosen, **changes), "test")


def write_run(folder: Path, directory: Path, kind: str = "tropd", **changes: Any) -> Path:
    """The file of a run that will live in `directory`, beside it."""
    if kind == "wide" and not (folder / "wide student").exists():
        write_wide_models(folder)
    path = directory.with_name(directory.name + ".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((run_of(folder, kind=kind, **{"output": str(directory), **changes})).dump())
    return path
