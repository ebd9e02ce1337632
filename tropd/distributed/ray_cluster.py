"""A run on a Ray cluster: an actor on each machine holds each process, and none outlives the launch."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from tropd.distributed.launch_lines import Launch, Server, servers_of
from tropd.errors import ConfigError, EngineError, ProcessLost, require
from tropd.servers.settings import is_loopback

_LAST_SECONDS = 30.0
"""Seconds that a process has to end after SIGTERM."""


class Held:
    """One process on a machine; this actor prints the process's output."""

    def place(self) -> tuple[str, int]:
        """This machine's address for other machines, and a free port."""
        import ray  # pyright: ignore[reportMissingImports]

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        into: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        self.process = subprocess.Popen([*command], env={**os.environ, **environment}, cwd=folder, **into)

    def wait(self) -> int:
        """Print its output until it ends; returns its exit code."""
        for line in self.process.stdout or ():
            print(line, end="", flush=True)
        return self.process.wait()

    def tell(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """End the process and its children, by force if SIGTERM does not help."""
        self.tell(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_LAST_SECONDS / 2)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def run_on_ray(launch: Launch, address: str | None = None) -> int:
    """Start the servers that do not answer, then the run, and wait; returns the exit code."""
    require("ray", "ray", "--cluster ray")
    missing = [server for server in servers_of(launch.run) if not _answers(server.url)]
    size, held = launch.processes + len(missing), []
    with _cluster(address, size) as ray:
        kind = "GPU" if launch.run.device != "cpu" and ray.cluster_resources().get("GPU") else "CPU"
        if (free := int(ray.available_resources().get(kind, 0))) < size:
            raise ConfigError(
                f"{size} processes and servers were asked for, one {kind} each, and {free} are free on this Ray "
                "cluster. Start fewer processes, or wait until others end."
            )
        each = {"num_cpus": 1, "num_gpus": int(kind == "GPU"), "max_concurrency": 4}
        try:
            _serve(ray, missing, each, held)
            return _train(ray, launch, each, held)
        finally:
            for process in held:
                with suppress(ray.exceptions.RayError):
                    ray.get(process.end.remote(), timeout=_LAST_SECONDS)


@contextmanager
def _cluster(address: str | None, size: int) -> Iterator[Any]:
    """Connect to an existing cluster, or start one on this machine."""
    import ray  # pyright: ignore[reportMissingImports]

    how: dict[str, Any] = {"address": address} if address else {}
    if not address and not os.environ.get("RAY_ADDRESS"):
        how = {"address": "local", "num_cpus": max(size, os.cpu_count() or 1), "include_dashboard": False}
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**how, logging_level=40)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own would abort
        yield ray
    except ConnectionError as error:
        raise ConfigError(f"no Ray cluster answers at {address or os.environ.get('RAY_ADDRESS')}: {error}") from error
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, before)


def _serve(ray: Any, servers: Sequence[Server], each: dict[str, int], held: list[Any]) -> None:
    """Start servers, each on the machine of its address, and wait until they answer."""
    nodes, ends = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}, {}
    for server in servers:
        host = ray.util.get_node_ip_address() if is_loopback(server.url) else urlsplit(server.url).hostname
        if host not in nodes:
            raise ConfigError(
                f"{server.url} does not answer, and cannot be started there: the Ray cluster has {', '.join(nodes)}. "
                "Start it yourself, or name one of these machines."
            )
        held.append(process := ray.remote(Held).options(**each, resources={f"node:{host}": 0.001}).remote())
        environment = {name: os.path.expandvars(value) for name, value in server.environment.items()}
        ray.get(process.start.remote(server.command, environment, os.getcwd()))
        ends[server.url] = process.wait.remote()
    for server in servers:
        while not _answers(server.url):
            if ray.wait([ends[server.url]], timeout=0.5)[0]:
                raise EngineError(f"{server.url} does not serve: `{server.line()}` has ended, as its lines above say.")


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url.rstrip("/").removesuffix("/v1") + "/v1/models", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code in (401, 403)  # an answer to a request without a key
    except OSError:
        return False
    return True


def _train(ray: Any, launch: Launch, each: dict[str, int], held: list[Any]) -> int:
    ranks = [ray.remote(Held).options(**each).remote() for _ in range(launch.processes)]
    host, port = ray.get(ranks[0].place.remote())
    environment = {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(launch.processes)}
    # Ray shows each process one GPU, which is number 0 there.
    environment |= {"LOCAL_RANK": "0", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    command = [sys.executable, "-m", "tropd", *launch.command]
    ray.get([p.start.remote(command, {**environment, "RANK": str(n)}, os.getcwd()) for n, p in enumerate(ranks)])
    held += ranks
    waiting, codes = {p.wait.remote(): n for n, p in enumerate(ranks)}, []
    with _heard() as asked:
        told, last = 0, float("inf")
        while waiting and len(asked) < 2 and time.monotonic() < last:  # a failure ends the others
            for reference in ray.wait([*waiting], timeout=0.5)[0]:
                codes.append(abs(_code(ray, reference, waiting.pop(reference))))
                last = min(last, time.monotonic() + _LAST_SECONDS) if codes[-1] else last
            if len(asked) > told:
                told = len(asked)
                ray.get([p.tell.remote(signal.SIGTERM) for p in ranks])  # Ray's workers block SIGINT
    return max(codes, default=0) or int(bool(waiting))


@contextmanager
def _heard() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of acting on them."""
    asked: list[int] = []
    before = {n: signal.signal(n, lambda number, frame: asked.append(number)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _code(ray: Any, reference: Any, rank: int) -> int:
    try:
        return ray.get(reference)
    except ray.exceptions.RayActorError as error:
        raise ProcessLost(f"rank {rank} is gone with its machine or its Ray worker: {error}") from error
