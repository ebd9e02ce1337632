"""The small runs that are stopped, killed and continued, and the fast paths that each of them takes.

Sizes are chosen for these paths: 28 new tokens are enough for the decoder, tiles of 40 tokens cut every batch, prompts
differ in length so that spans pay.  A run whose path is missing from what it took proves nothing about that path.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer, tiny_model
from tropd.base.fast_paths import FastPath as P

SIZES: dict[str, Any] = {
    "steps": 6,
    "tokens_per_micro_batch": 160,
    "tile_tokens": 40,
    "grader": "exact",
    "method": {"name": "tropd", "top_k": 8, "beta": 0.1},
    "rollout": {"num_prompts": 3, "num_rollouts": 2, "max_new_tokens": 28, "save_every": 2},
    "optimizer": {"learning_rate": 1e-3},
    "evaluation": {"every": 3, "num_samples": 2, "max_new_tokens": 20},
    "checkpoint": {"every": 2},
    "alarms": {"support_collapse": "off"},
}
"""Four prompts, three a step: the second epoch begins in the middle of the second step."""

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

ALWAYS = {P.DECODER, P.SHARED_PROMPTS}
TEXTS = {P.KEPT_TEXTS}
HEAD = {P.FUSED_HEAD, P.FUSED_READ, P.SEVERAL_TILES}
TAKES: dict[str, set[P]] = {
    "tropd": ALWAYS | TEXTS | HEAD | {P.SPANS, P.SOME_TOP_K},
    "entropy": ALWAYS | HEAD | {P.REFILLED_BATCH, P.GROWN_CACHE, P.LIVE_ROWS},
    "lora": ALWAYS | TEXTS | HEAD | {P.SPANS},
    "updates": ALWAYS | TEXTS | HEAD | {P.SPANS},
    "streaming": ALWAYS | TEXTS | {P.SPANS, P.LEAN_HEAD, P.LEAN_READ, P.SEVERAL_TILES},
    "bfloat16": ALWAYS | TEXTS | HEAD | {P.PEAKS},
    "dense": ALWAYS | {P.DENSE_HEAD, P.SEVERAL_TILES},
    "wide": ALWAYS | {P.PACKED_MATRICES, P.FUSED_HEAD, P.SOFTMAX_IN_PARTS, P.SUPPORTS_IN_PARTS, P.COLUMNS},
}
"""What each case has to take, whether it is left alone or continued."""


def write_models(folder: Path) -> Path:
    """Students, teachers and data sets, which runs only read."""
    tokenizer = byte_tokenizer()
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(tiny_model("qwen3", seed=seed, tied=True), tokenizer, folder / name)
    for name, size in (("data", 2), ("many", 7)):
        rows = [
            {"prompt": "sum " * (2 * a + b) + f"{a}+{b}=", "answer": str(a + b), "kind": ("even", "odd")[b % 2]}
            for a in range(size)
            for b in range(size)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_wide_models(folder: Path) -> Path:
    """A head of 2^20 weights and more, all of whose rows are tokens, over layers of 2^15 and more."""
    tokenizer = byte_tokenizer(vocab=2**13)
    for name, seed in (("wide student", 0), ("wide teacher", 1)):
        model = tiny_model("qwen3", seed=seed, tied=True, width=128, vocab=2**13, sharp=8.0)
        save_model(model, tokenizer, folder / name)
    return folder


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    whole = copy.deepcopy(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(whole.get(name), dict) and "name" not in value
        whole[name] = merged(whole[name], value) if both else value
    return whole


def write_run(models: Path, directory: Path, case: str = "tropd", **changes: Any) -> Path:
    """The configuration of a run that will live in `directory`, as a file beside it."""
    from tropd.config import file as config_file

    data = {"path": str(models / "data.jsonl")}
    values = merged(
        {
            **SIZES,
            "output": str(directory),
            "student": {"path": "student"},
            "teacher": {"path": "teacher"},
            "data": data,
        },
        {"evaluation": {"data": {**data, "limit": 2}}},
    )
    values = merged(values, CASES[case])
    for whose in ("student", "teacher"):
        if values[whose]["path"] != "base":
            values[whose]["path"] = str(models / values[whose]["path"])
    values = merged(values, changes)
    if case == "wide" and not (models / "wide student").exists():
        write_wide_models(models)
    path = directory.with_name(directory.name + ".toml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(config_file.dump(config_file.build(values, "test")))
    return path
