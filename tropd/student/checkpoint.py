"""Save and load a run's state: all of it, or nothing.

    checkpoints/step_000120/
        run.toml                the run itself
        weights.safetensors     trained parameters (and buffers)
        optimizer.safetensors   moments, float32 masters
        state.json              step, prompt cursor, alarms, random state, and the size and hash of the files above

A checkpoint is written to step_000120.tmp, flushed to the disk and renamed, so a process killed at any moment leaves
the previous ones as they were.  state.json is written last and is checked on loading.  No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tropd.errors import CheckpointError

SCHEMA = 1
_HASHED = 1 << 25  # 32 MiB from each end: enough to notice a torn or swapped file, fast for any size


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint as read: what the loop needs to go on."""

    path: Path
    step: int
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that are trained, each once although tied ones have several names, and persistent buffers."""
    kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    persistent = set(model.state_dict())
    return kept | {name: b for name, b in model.named_buffers() if name in persistent}


def load_trained(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    own = trained_tensors(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise CheckpointError(
            f"{source} holds {len(weights)} tensors, the student trains {len(own)}; they differ in {odd[0]!r}"
            f"{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}. It belongs to another model."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape:
                raise CheckpointError(
                    f"{source}: {name!r} has shape {tuple(weights[name].shape)}, the student's has "
                    f"{tuple(tensor.shape)}. It belongs to another model."
                )
            tensor.copy_(weights[name])


def save(
    directory: Path, step: int, *, weights: dict[str, Tensor], optimizer: dict[str, Tensor], run: str, state: dict
) -> Path:
    """Write checkpoints/step_N under the run's folder and return it."""
    final = directory / "checkpoints" / f"step_{step:06d}"
    with atomic_folder(final) as folder:
        (folder / "run.toml").write_text(run)
        for name, tensors in (("weights", weights), ("optimizer", optimizer)):
            save_file({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, folder / f"{name}.safetensors")
        files = {p.name: describe_file(p) for p in sorted(folder.iterdir())}
        text = json.dumps({"kind": "tropd checkpoint", "schema": SCHEMA, "step": step, "files": files, **state})
        (folder / "state.json").write_text(text)
    return final


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all."""
    temporary = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{final} cannot be written: {error}. What was saved before is untouched; free the disk or choose "
            "another folder."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe_file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_HASHED))
        if size > 2 * _HASHED:
            file.seek(-_HASHED, os.SEEK_END)
        digest.update(file.read(_HASHED))
    return {"bytes": size, "sha256": digest.hexdigest()}


def find(directory: Path, step: int | None = None) -> Path | None:
    """The checkpoint of a step, or the newest; None when there is none yet.  Unfinished ones do not count."""
    there = sorted(p for p in (directory / "checkpoints").glob("step_*") if p.suffix != ".tmp")
    if step is None:
        return there[-1] if there else None
    wanted = directory / "checkpoints" / f"step_{step:06d}"
    if wanted not in there:
        known = ", ".join(str(int(p.name[5:])) for p in there) or "none"
        raise CheckpointError(f"there is no checkpoint of step {step} in {directory}. There are: {known}.")
    return wanted


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; one that was cut short, or that something else wrote, is refused in words."""
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} has no readable state.json ({error}): it was cut short or is no checkpoint of tropd. "
            "Resume from an older one with --step."
        ) from error
    if state.get("kind") != "tropd checkpoint" or state.get("schema") != SCHEMA:
        raise CheckpointError(
            f"{path} is of kind {state.get('kind')!r}, schema {state.get('schema')!r}; this tropd reads "
            f"'tropd checkpoint', schema {SCHEMA}."
        )
    for name, expected in state["files"].items():
        file = path / name
        if not file.exists() or describe_file(file) != expected:
            size = file.stat().st_size if file.exists() else 0
            raise CheckpointError(
                f"{file} is damaged: it has {size} bytes, {expected['bytes']} were written, or its content differs. "
                "Resume from an older checkpoint with --step."
            )
    weights, optimizer = (load_file(path / f"{name}.safetensors") for name in ("weights", "optimizer"))
    return Checkpoint(path=path, step=state["step"], state=state, weights=weights, optimizer=optimizer)


def prune(directory: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` and the best one."""
    there = sorted(p for p in (directory / "checkpoints").glob("step_*") if p.suffix != ".tmp")
    for path in there[:-keep]:
        if best is None or path.name != f"step_{best:06d}":
            shutil.rmtree(path, ignore_errors=True)
