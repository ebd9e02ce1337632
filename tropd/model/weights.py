"""Weights that fit: every tensor that a model has was read from its files, and every tensor of the files is used.

A tensor that is not read keeps its random initial values, and the model still trains, scores and writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from tropd.base.reading import refusing
from tropd.errors import ConfigError
from tropd.version import cannot_import

_SHOWN = 4


def check_read(model: Any, info: Mapping[str, Any], source: str, whose: str) -> None:
    """Refuse a model whose files do not fit its configuration.  `info` is transformers' report of the
    loading, without tied tensors and those that the architecture does not need."""
    shapes = [f"{name}: {list(held)} instead of {list(own)}" for name, held, own in info["mismatched_keys"]]
    _refuse(
        f"the weights of the {whose} {source} do not fit {type(model).__name__} as its config.json describes it",
        lacking=info["missing_keys"],
        beyond=info["unexpected_keys"],
        shaped=shapes,
        rest="What is not read would be random. Put the model's own config.json and all files of its weights in place.",
    )


def load_adapter(model: Any, folder: Path) -> Any:
    """The model under an exported adapter."""
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise cannot_import(error, "peft", "lora", f"{folder} is an adapter, which") from None
    path = folder / "adapter_model.safetensors"
    with refusing(lambda why: f"the adapter {path} cannot be read: {why}. Name a folder that PEFT can read."):
        with safe_open(path, "pt") as file:
            held = set(file.keys())
        adapted: Any = PeftModel.from_pretrained(model, str(folder))
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    _refuse(
        f"the adapter {path} does not fit its adapter_config.json",
        lacking=wanted - held,
        beyond=[name for name in held - wanted if "lora_" in name],
        rest="What is not read would be as new. Put the adapter's own files back.",
    )
    return adapted


def _refuse(what: str, *, lacking: Iterable[str], beyond: Iterable[str], shaped: Iterable[str] = (), rest: str) -> None:
    found = [
        f"{len(names)} {said} ({', '.join(sorted(names)[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for said, names in (
            ("tensors are missing", [*lacking]),
            ("tensors belong nowhere", [*beyond]),
            ("tensors have another shape", [*shaped]),
        )
        if names
    ]
    if found:
        raise ConfigError(f"{what}: {'; '.join(found)}. {rest}")
