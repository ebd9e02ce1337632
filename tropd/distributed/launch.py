"""From a launcher's environment to the processes of a run, which end together and report an error once.

torchrun --nproc-per-node 4 -m tropd train RUN.toml
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from tropd.distributed.ranks import ALONE, Ranks
from tropd.errors import ConfigError, ProcessLost, TropdError

if TYPE_CHECKING:
    from tropd.config.run import Run

_MEETING = timedelta(seconds=60)
_SECONDS_FOR_A_REASON = 2.0


def launched(environment: Mapping[str, str] = os.environ) -> int:
    """The number of processes that the launcher started; an inconsistent launch is refused."""
    variables = {name: environment.get(name, "") for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if not variables["WORLD_SIZE"]:
        return 1
    numbers = {name: variables[name] for name in ("WORLD_SIZE", "RANK", "MASTER_PORT") if variables[name]}
    if odd := {name: text for name, text in numbers.items() if not text.isdigit()}:
        name, text = next(iter(odd.items()))
        raise ConfigError(f"{name} is {text!r} in the environment, which is no number. {_HOW}")
    size = int(variables["WORLD_SIZE"])
    if size <= 1:
        return 1
    if missing := [name for name, text in variables.items() if not text]:
        raise ConfigError(
            f"WORLD_SIZE is {size} in the environment, which asks for {size} processes, but {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not set: something else than torchrun has set it. {_HOW}"
        )
    if int(variables["RANK"]) >= size:
        raise ConfigError(f"RANK is {variables['RANK']}, but WORLD_SIZE = {size} knows ranks 0 to {size - 1}. {_HOW}")
    return size


_HOW = (
    "Start several processes with `torchrun --nproc-per-node N -m tropd train RUN.toml` (docs/parallel.md), and one "
    "process with WORLD_SIZE unset."
)


@contextmanager
def together(run: Run, directory: Path) -> Iterator[Ranks]:
    """Connect all processes of the launch for the block.  An error in one ends all, and is reported once."""
    size = launched()
    if size == 1:
        yield ALONE
        return
    world = _join(run, int(os.environ["RANK"]), size)
    try:
        yield world
        world.wait()  # keeps the connection until every rank is done
    except BaseException as error:
        with suppress(ValueError):  # only a main thread has signals
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's answer to the first that ends; this one knows
        if not _is_lost(error):
            _leave_word(type(error).__name__)
            raise
        if _told():
            raise SystemExit(1) from None
        raise ProcessLost(
            f"a process of this run is gone without a word (it was killed, ran out of memory, or its machine is "
            f"unreachable), and the other {size - 1} cannot go on without it. The last checkpoint is untouched: "
            f"go on with `tropd resume {directory}`, on as many processes as you like."
        ) from error
    dist.destroy_process_group()


def speaks_first() -> bool:
    """Whether this process should tell the user why the run ends, because no other process has."""
    try:
        return launched() == 1 or _store().add("speakers", 1) == 1
    except (ConfigError, RuntimeError):  # no launch that is understood, or the store is gone with its process
        return True


def _join(run: Run, rank: int, size: int) -> Ranks:
    if run.rollout.num_prompts < size:
        raise ConfigError(
            f"{size} processes share {run.rollout.num_prompts} prompts a step, which leaves some without any. Raise "
            f"rollout.num_prompts to {size} or more, or start fewer processes."
        )
    on_gpu = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    if on_gpu:
        _take_device(rank)
    if rank:
        _be_quiet()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("tropd", _store()),
            rank=rank,
            world_size=size,
            timeout=timedelta(minutes=run.parallel.timeout_minutes),
        )
        world = Ranks(rank, size)
        world.wait()
    except RuntimeError as error:
        raise ConfigError(_unmet(size, error)) from error
    return world


def _unmet(size: int, error: Exception) -> str:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    return f"the {size} processes could not meet at {place}: {str(error).splitlines()[0]} {_HOW}"


def _take_device(rank: int) -> None:
    number = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or str(rank)
    there = torch.cuda.device_count()
    if not number.isdigit() or int(number) >= there:
        raise ConfigError(
            f"process {rank} is number {number} on its machine, but torch sees {there} GPUs there: each process needs "
            'one of its own. Start as many as there are GPUs, or set device = "cpu".'
        )
    torch.cuda.set_device(int(number))


def _be_quiet() -> None:
    """Hide progress bars and warnings: rank 0 shows them for all."""
    import warnings

    from tropd.model import hf

    warnings.simplefilter("ignore")
    hf.quiet(warnings_too=True)


@cache
def _store() -> Store:
    """The store in which processes leave messages for each other; torchrun keeps it outside of them."""
    from torch.distributed.rendezvous import rendezvous

    try:
        store, *_ = next(rendezvous("env://", timeout=_MEETING))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(_unmet(launched(), error)) from error
    return PrefixStore("words", store)


def _leave_word(reason: str) -> None:
    with suppress(RuntimeError):  # the store went with the process that held it
        _store().set("reason", reason)


def _told() -> bool:
    """Whether another process has reported why it ends; waits a moment for it."""
    deadline = time.monotonic() + _SECONDS_FOR_A_REASON
    while time.monotonic() < deadline:
        try:
            if _store().check(["reason"]):
                return True
        except RuntimeError:
            return False
        time.sleep(0.05)
    return False


_BROKEN = ("gloo", "nccl", "connection", "timed out", "socket")


def _is_lost(error: BaseException | None) -> bool:
    """Whether this error means that another process has ended."""
    while error is not None and not isinstance(error, TropdError):
        broken = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _BROKEN)
        if isinstance(error, dist.DistError) or (type(error) is RuntimeError and broken):
            return True
        error = error.__cause__ or error.__context__
    return False
