"""Commands that start the processes of a run: for torchrun and SLURM, and for the servers in its file.

`tropd.distributed.ray_cluster` starts the same commands on a Ray cluster.  A process does not know its launcher.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from tropd.base.ranges import Count, Ranged
from tropd.base.reading import printable
from tropd.config.models import ModelConfig, ServerConfig
from tropd.config.run import Run
from tropd.errors import ConfigError
from tropd.servers.dialects import dialect_of
from tropd.servers.settings import is_loopback


@dataclass(frozen=True, kw_only=True)
class Launch(Ranged):
    """A run and its number of processes."""

    run: Run
    command: tuple[str, ...]
    """Arguments of tropd: train RUN.toml, or resume FOLDER."""
    processes: Count = 1
    """At least 1."""
    nodes: Count = 1
    """At least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes % self.nodes:
            raise ConfigError(
                f"{self.processes} processes on {self.nodes} machines were asked for; give as many processes on "
                "every machine."
            )


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that the run file names."""

    url: str
    command: tuple[str, ...]
    environment: dict[str, str]
    """A value $NAME means the environment variable of that name."""

    def line(self) -> str:
        return " ".join([*(f'{name}="{value}"' for name, value in self.environment.items()), shlex.join(self.command)])


def servers_of(run: Run) -> list[Server]:
    """Commands that start the run's servers.  The user starts servers of other kinds."""
    top_k = run.method.objective.teacher_top_k
    weights, lora = dialect_of(run.rollout.server).weights, run.student.lora
    taking, variables = weights.serving(lora.rank if lora else None) if weights else ([], {})
    teachers = []
    for teacher in run.all_teachers.values():
        flag = dialect_of(teacher.server).top_k_flag
        scoring = [flag, str(top_k)] if flag and top_k else []
        teachers += [_server(url, teacher.server, teacher, scoring, {}) for url in teacher.servers]
    writers = [_server(url, run.rollout.server, run.student, taking, variables) for url in run.rollout.servers]
    return [*_once(server for server in teachers if server is not None), *(w for w in writers if w is not None)]


def _once(servers: Iterable[Server]) -> list[Server]:
    """One server for each address: several teachers may be the same model."""
    found: dict[str, Server] = {}
    for server in servers:
        other = found.setdefault(urlsplit(server.url).netloc, server)
        if other.line() != server.line():
            raise ConfigError(
                f"two teachers are served at {server.url}, but not by one command: `{other.line()}` and "
                f"`{server.line()}`. Give each an address of its own, or the same path, dtype and server settings."
            )
    return list(found.values())


def _server(
    url: str, settings: ServerConfig, model: ModelConfig, more: list[str], variables: dict[str, str]
) -> Server | None:
    for name, value in (
        ("the model's path", model.path),
        ("server.model", settings.model),
        ("revision", model.revision),
    ):
        if value and value.startswith("-"):
            raise ConfigError(f"{name} is {value!r}, which a server would read as one of its flags. Give another name.")
    program = dialect_of(settings).program
    if not program:
        return None
    flags = {"served-model-name": settings.model, "revision": model.revision}
    flags["dtype"] = None if model.dtype == "auto" else model.dtype
    place = urlsplit(url)
    host = place.hostname if is_loopback(url) else "0.0.0.0"  # open to others only where others are meant
    command = [*program, model.path, "--host", str(host), "--port", str(place.port or 80)]
    command += [word for name, value in flags.items() if value for word in (f"--{name}", value)]
    key = {"VLLM_API_KEY": f"${settings.api_key_env}"} if settings.api_key_env else {}
    return Server(url=url, command=(*command, *more), environment={**variables, **key})


def lines(launch: Launch) -> str:
    """Commands for a shell, for `srun`, and for `sbatch`."""
    each, asked = launch.processes // launch.nodes, shlex.join(["-m", "tropd", *launch.command])
    meet = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500"
    many = f"torchrun --nnodes {launch.nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint"
    local = f"torchrun --nproc-per-node {each} {asked}" if launch.nodes == 1 else f"{many} FIRST_MACHINE:29500 {asked}"
    inner = shlex.quote(f"{many} {meet} {asked}")
    place = [f"--nodes={launch.nodes}", "--ntasks-per-node=1"]
    place += [] if launch.run.device == "cpu" else [f"--gpus-per-node={each}"]
    script = ["#!/bin/bash", *(f"#SBATCH {option}" for option in place), f"srun bash -c {inner}"]
    parts = {
        "servers, each on the machine of its address": [server.line() for server in servers_of(launch.run)],
        "torchrun" + (", on every machine" if launch.nodes > 1 else ""): [local],
        "SLURM, now": [f"srun {' '.join(place)} bash -c {inner}"],
        "SLURM, in the queue: save as run.sbatch, then `sbatch run.sbatch`": script,
    }
    for line in (line for commands in parts.values() for line in commands):
        if not line.isprintable():
            raise ConfigError(f"{printable(line)[:300]!r} holds a control character, which no command line should.")
    return "\n\n".join("\n".join([f"# {title}", *commands]) for title, commands in parts.items() if commands) + "\n"
