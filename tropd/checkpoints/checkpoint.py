"""Save and load a run's state, completely or not at all.

    checkpoints/step_000120/
        run.toml                the run itself
        weights.safetensors     trained parameters (and buffers)
        optimizer.safetensors   moments, float32 masters
        teachers.safetensors    weights of teachers that follow the student, if there are any
        state.json              step, prompt cursor, alarms, size and hash of the files above, and its own hash
        shard-*.safetensors     instead of the others, where several processes hold a part each

A checkpoint is written to step_000120.tmp, flushed to the disk and renamed, so a process killed at any moment leaves
the previous ones as they were.  Everything is checked on loading.  No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
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

from tropd.base.reading import opened, read_json
from tropd.errors import CheckpointError, TrainingDiverged
from tropd.model.optimizer import KINDS

SCHEMA = 1
_FILES = ("weights", "optimizer", "teachers")
_HASHED = 1 << 25  # 32 MiB from each end: enough to notice a torn or swapped file, fast for any size


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint as read: what the loop needs to continue."""

    path: Path
    step: int
    state: dict[str, Any]
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    teachers: dict[str, Tensor]
    """Of teachers that follow the student."""


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, each once even if tied under several names, and persistent buffers."""
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
    directory: Path,
    step: int,
    *,
    weights: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    run: str,
    state: dict,
    teachers: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoints/step_N under the run's folder and return it.  Broken weights never replace what is there."""
    refuse_broken(directory, step, first_broken(weights))
    final = place_of(directory, step)
    with atomic_folder(final) as folder:
        (folder / "run.toml").write_text(run)
        files = {"weights": weights, "optimizer": optimizer} | ({"teachers": teachers} if teachers else {})
        for name, tensors in files.items():
            save_file({k: x.detach().cpu().contiguous() for k, x in tensors.items()}, folder / f"{name}.safetensors")
        seal(folder, step, state)
    return final


def first_broken(weights: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that is not finite."""
    return next((name for name, tensor in weights.items() if not tensor.isfinite().all()), None)


def refuse_broken(directory: Path, step: int, name: str | None) -> None:
    if name is not None:
        raise TrainingDiverged(
            f"{name!r} is not finite after {step} steps, so these weights were not saved and the checkpoints "
            f"before them are untouched: {_listed(directory)}. Lower the learning rate."
        )


def seal(folder: Path, step: int, state: dict) -> None:
    """Write state.json, which describes the files that are there."""
    files = {p.name: describe_file(p) for p in sorted(folder.iterdir())}
    values = {"kind": "tropd checkpoint", "schema": SCHEMA, "step": step, "files": files, **state}
    values = json.loads(json.dumps(values))  # as they will be read
    (folder / "state.json").write_text(json.dumps({"sha256": _digest_of(values), **values}))


def _digest_of(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """If writing fails, tell the user which run's folder failed, and what is left of it."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the run's folder {directory} cannot be written: {error}. The checkpoints in it are untouched: free the "
            f"disk or mend the folder, then go on with `tropd resume {directory}`."
        ) from error


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """A folder that appears complete or not at all."""
    temporary = final.with_name(final.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        mode = (
            temporary.stat().st_mode & 0o666
        )  # what the user's umask gives; some libraries write files for them alone
        for path in [*temporary.rglob("*"), temporary]:
            if path.is_file():
                path.chmod(mode)
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
    with opened(path, CheckpointError) as file:
        digest.update(file.read(_HASHED))
        if size > 2 * _HASHED:
            file.seek(-_HASHED, os.SEEK_END)
        digest.update(file.read(_HASHED))
    return {"bytes": size, "sha256": digest.hexdigest()}


def steps_kept(directory: Path) -> list[int]:
    """The steps of the finished checkpoints, oldest first."""
    names = (re.fullmatch(r"step_(\d{6,})", p.name) for p in (directory / "checkpoints").glob("step_*"))
    return sorted(int(name[1]) for name in names if name)


def place_of(directory: Path, step: int) -> Path:
    return directory / "checkpoints" / f"step_{step:06d}"


def _listed(directory: Path) -> str:
    return ", ".join(map(str, steps_kept(directory))) or "none"


def find(directory: Path, step: int | None = None) -> Path | None:
    """The checkpoint of a step, or the newest; None if there is none yet.  Unfinished ones do not count."""
    there = steps_kept(directory)
    if step is None:
        return place_of(directory, there[-1]) if there else None
    if step not in there:
        raise CheckpointError(f"there is no checkpoint of step {step} in {directory}. There are: {_listed(directory)}.")
    return place_of(directory, step)


def load(path: Path, *, tensors: bool = True) -> Checkpoint:
    """Read a checkpoint; an error explains one that is incomplete, changed, or not a checkpoint of tropd.

    Without `tensors` it is only checked: ranks read their parts of them.
    """
    state = _read_state(path)
    for name, expected in state["files"].items():
        file = path / name
        if not file.exists() or describe_file(file) != expected:
            size = file.stat().st_size if file.exists() else 0
            raise CheckpointError(
                f"{file} is damaged: it has {size} bytes, {expected['bytes']} were written, or its content differs. "
                f"{_others(path)}"
            )
    found = _read_tensors(path, set(state["files"])) if tensors else {name: {} for name in _FILES}
    return Checkpoint(path=path, step=state["step"], state=state, **found)


def _read_tensors(path: Path, files: set[str]) -> dict[str, dict[str, Tensor]]:
    """Whole tensors by what they are of, from one process or from shards."""
    if "weights.safetensors" not in files:
        from tropd.checkpoints import shard_files

        found = shard_files.read(path)
        file_of: dict[str, str] = dict.fromkeys(("teacher", "teachers", "readers"), "teachers")
        file_of |= dict.fromkeys(("master", *KINDS), "optimizer")
        kept: dict[str, dict[str, Tensor]] = {name: {} for name in _FILES}
        for name, x in found.items():
            kept[file_of.get(name.split(".")[0], "weights")][name] = x
        return kept
    try:
        return {n: load_file(p) if (p := path / f"{n}.safetensors").name in files else {} for n in _FILES}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_others(path)}") from error


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = read_json(path / "state.json", CheckpointError)
    except CheckpointError as error:
        raise CheckpointError(f"{error} It was cut short or is no checkpoint of tropd. {_others(path)}") from None
    kind, schema = (state.get("kind"), state.get("schema")) if isinstance(state, dict) else (None, None)
    if kind != "tropd checkpoint" or schema != SCHEMA:
        raise CheckpointError(
            f"{path / 'state.json'} is of kind {kind!r}, schema {schema!r}; this tropd reads 'tropd checkpoint', "
            f"schema {SCHEMA}. {_others(path)}"
        )
    written = state.pop("sha256", None)
    if written != _digest_of(state):
        raise CheckpointError(f"{path / 'state.json'} is damaged: its content is not what was written. {_others(path)}")
    return state


def _others(path: Path) -> str:
    """The other checkpoints that a run could resume from."""
    directory = path.parent.parent
    steps = [str(step) for step in steps_kept(directory) if place_of(directory, step) != path]
    if not steps:
        return "There is no other checkpoint to resume from."
    return f"Resume from another one with --step; there are: {', '.join(steps)}."


def prune(directory: Path, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` and the best one, and what killed processes left unfinished."""
    for step in steps_kept(directory)[:-keep]:
        if step != best:
            _discard(place_of(directory, step))
    for path in (directory / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def drop_after(directory: Path, step: int) -> list[int]:
    """Delete the checkpoints of later steps, newest first; returns their steps."""
    later = [other for other in reversed(steps_kept(directory)) if other > step]
    for other in later:
        _discard(place_of(directory, other))
    return later


def _discard(path: Path) -> None:
    """Rename, then delete: a process killed halfway leaves no partial checkpoint under its name."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        path.rename(temporary)
    except OSError as error:
        raise CheckpointError(f"the old checkpoint {path} cannot be deleted: {error}. Delete it by hand.") from error
    shutil.rmtree(temporary, ignore_errors=True)
