"""Hashes of what a run reads but does not train.  No checkpoint holds these files, and a run that is resumed with other
files would be another run.

An origin maps each file of a model (or a property of it) to a hash of its content.  Reading every byte of large weights
takes time, so hashes are kept in the user's cache for as long as a file's size and times stay the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tropd.config.models import ModelConfig
from tropd.errors import CheckpointError
from tropd.model.loading import model_fingerprint

Origin = dict[str, str]

_SETTINGS = ("config.json", "generation_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_config.json", "adapter_model.safetensors")


def origin_of(config: ModelConfig, model: Any = None) -> Origin:
    """The origin of a model's settings and tokenizer; with a frozen model, of its weights and their precision too."""
    folder = _folder_of(config.path, config.revision)
    tokenizer = folder if config.tokenizer is None else _folder_of(config.tokenizer, None)
    if folder is None:
        return {} if model is None else {"weights": model_fingerprint(model, whole=True)}
    files = {name: folder / name for name in _SETTINGS}
    files |= {path.name: path for path in (folder.glob("*.py") if config.trust_remote_code else ())}
    files |= {name: tokenizer / name for name in _TOKENIZER if tokenizer is not None}
    origin: Origin = {}
    if model is not None:
        files |= {name: folder / name for name in _weight_files(folder, config.gguf_file)}
        origin["precision"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return origin | content_of({name: path for name, path in sorted(files.items()) if path.is_file()})


def origin_of_objects(model: Any, tokenizer: Any, *, weights: bool) -> Origin:
    """The same for a model and a tokenizer that were given in Python."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    texts = {
        "config.json": model.config.to_json_string(),
        "tokenizer": backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        "chat_template": str(tokenizer.chat_template),
    }
    origin = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}
    if weights:
        origin["weights"] = model_fingerprint(model, whole=True)
        origin["precision"] = str(next(model.parameters()).dtype).removeprefix("torch.")
    return origin


def name_of(origin: Mapping[str, str]) -> str:
    """One hash of a whole origin."""
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:32]


def check_same(held: Mapping[str, Any], own: Mapping[str, Origin], checkpoint: Path) -> None:
    """Refuse to resume with other files than a checkpoint was trained with."""
    for whose, origin in own.items():
        before = held.get(whose)
        before = before if isinstance(before, dict) else {}
        changed = sorted(name for name in before | origin if before.get(name) != origin.get(name))
        if changed:
            raise CheckpointError(
                f"{checkpoint} was trained with something else than what there is now: of the {whose}, "
                f"{', '.join(changed)} changed. Put the old content back, or start a new run."
            )


def content_of(files: Mapping[str, Path]) -> Origin:
    """The SHA-256 of whole files."""
    kept, found = _recall(), {}
    for name, path in files.items():
        place, state = str(path.resolve()), _state(path)
        known = kept.get(place)
        if known is None or known[:-1] != state:
            with path.open("rb") as file:
                kept[place] = [*state, hashlib.file_digest(file, "sha256").hexdigest()]
        found[name] = str(kept[place][-1])
    _keep(kept, (str(path.resolve()) for path in files.values()))
    return found


def _state(path: Path) -> list[int]:
    """The properties of a file that change when it is written."""
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino]


def _cache() -> Path:
    own, users = os.environ.get("TROPD_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (Path(own) if own else Path(users) / "tropd").expanduser() / "hashes.json"


def _recall() -> dict[str, list[Any]]:
    """The cached hashes; none if the cache cannot be read."""
    with suppress(OSError, ValueError, RecursionError):
        hashes = json.loads(_cache().read_text())
        if isinstance(hashes, dict):
            return {place: known for place, known in hashes.items() if isinstance(known, list) and len(known) == 5}
    return {}


def _keep(kept: Mapping[str, list[Any]], places: Iterable[str]) -> None:
    """Write the cache; if that fails, files are read again next time."""
    before = _recall()
    fresh = {place: kept[place] for place in places}
    if all(before.get(place) == known for place, known in fresh.items()):
        return
    begun = _cache().with_name(f"hashes.json.{os.getpid()}.tmp")
    with suppress(OSError):
        begun.parent.mkdir(parents=True, exist_ok=True)
        begun.write_text(json.dumps(before | fresh))
        begun.replace(_cache())


def _weight_files(folder: Path, gguf_file: str | None) -> list[str]:
    """The names that transformers reads weights from."""
    if gguf_file:
        return [gguf_file]
    for name in _WEIGHTS[:2]:
        index = folder / f"{name}.index.json"
        if index.is_file():
            with suppress(OSError, ValueError, KeyError, AttributeError):
                return [index.name, *sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return list(_WEIGHTS)


def _folder_of(path: str, revision: str | None) -> Path | None:
    """The folder of the files on this machine, also for a hub id once it was downloaded."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import try_to_load_from_cache

    with suppress(ValueError):
        for name in ("config.json", "tokenizer_config.json"):
            found = try_to_load_from_cache(path, name, revision=revision)
            if isinstance(found, str):
                return Path(found).parent
    return None


def prompts_origin(names: Iterable[str]) -> Origin:
    """The origin of prompts, from the names of everything that is read of them."""
    return {"prompts": hashlib.sha256("\n".join(names).encode()).hexdigest()}
