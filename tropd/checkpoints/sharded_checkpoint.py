"""Save and restore a sharded student: each rank its part, on any number of ranks.

Names and types are those of `tropd.checkpoints.checkpoint`, so each module can read the other's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

from tropd.checkpoints import shard_files
from tropd.checkpoints.checkpoint import atomic_folder, first_broken, place_of, refuse_broken, seal
from tropd.distributed.ranks import Ranks
from tropd.distributed.sharding import Shards
from tropd.errors import CheckpointError
from tropd.model.optimizer import KINDS, Optimizer, local


def save(
    directory: Path,
    step: int,
    *,
    shards: Shards,
    optimizer: Optimizer,
    teachers: Mapping[str, Tensor],
    run: str,
    state: dict,
    world: Ranks,
) -> None:
    """Write checkpoints/step_N, all ranks together; broken weights never replace what is there."""
    weights = shards.weights()
    broken = world.gather_json(first_broken({name: local(x) for name, x in weights.items()}))
    refuse_broken(directory, step, next((name for name in broken if name), None))
    final = place_of(directory, step)
    with atomic_folder(final) if world.leads else nullcontext(final.with_name(final.name + ".tmp")) as folder:
        world.wait()  # the folder is there
        shard_files.write(folder, weights | shards.masters() | optimizer.state_tensors() | dict(teachers))
        if world.leads:
            (folder / "run.toml").write_text(run)
            seal(folder, step, state)
    world.wait()  # it has its name


def restore(
    path: Path, shards: Shards, optimizer: Optimizer, num_steps: int, teachers: Mapping[str, Tensor] | None = None
) -> None:
    """Read a checkpoint of any number of processes, all ranks together, and fill the whole model again; also these
    tensors of teachers that follow the student."""
    known = shard_files.known(path)
    buffers = {name: b for name, b in shards.weights().items() if name in dict(shards.whole.named_buffers())}
    targets: dict[str, Tensor] = {**buffers, **(teachers or {})}
    for name, parameter in shards.cut.named_parameters():
        targets[f"master.{name}" if f"master.{name}" in known else name] = parameter.detach()
    moments = _moments(optimizer) if any(name.split(".")[0] == "step" for name in known) else {}
    targets |= moments
    for name, target in targets.items():
        if name not in known or known[name].size != target.shape:
            there = f"shape {tuple(known[name].size)}" if name in known else "no place"
            raise CheckpointError(
                f"{path}: {name!r} has {there} there, the student's has shape {tuple(target.shape)}. It belongs to "
                "another model."
            )
    shard_files.read_into(path, targets)
    copies = dict(shards.cut.named_buffers())
    for name, buffer in buffers.items():
        copies[name].copy_(buffer)
    optimizer.load_state_tensors(moments, num_steps)
    shards.empty()
    shards.fill()


def _moments(optimizer: Optimizer) -> dict[str, Tensor]:
    """Empty tensors for AdamW's state, as large as this rank's parts."""
    moments: dict[str, Tensor] = {}
    for name in optimizer.masters:
        moments[f"{KINDS[0]}.{name}"] = torch.tensor(0.0)
        moments |= {f"{kind}.{name}": torch.zeros_like(optimizer.masters[name]).detach() for kind in KINDS[1:]}
    return moments
