"""Real vLLM servers on this machine's CPU, each a process group of its own that is ended with the test.

    with serve(folder, flags=("--max-logprobs", "64")) as server:
        server.url                     # http://127.0.0.1:PORT

`make vllm` (scripts/install_vllm.sh) installs it; without it the tests that need it are skipped.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

VENV = Path(__file__).parents[2] / ".venv-vllm"
PYTHON = VENV / "bin" / "python"
START_SECONDS = 240


@dataclass(frozen=True, kw_only=True)
class Server:
    url: str
    name: str
    """Under which the model is served."""
    process: subprocess.Popen[bytes]
    log: Path

    def kill(self) -> None:
        """End it and all its children at once, as a crash would."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    model: Path,
    *,
    log: Path,
    name: str = "tiny",
    port: int | None = None,
    max_model_len: int = 256,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """A server that is ready.  Flags given here come last, so they win."""
    port = port or free_port()
    command = [str(PYTHON), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", str(max_model_len), "--enforce-eager", "--max-num-seqs", "32", *flags]
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1"}
    own |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "DO_NOT_TRACK": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **own, **(environment or {})},
            start_new_session=True,
        )
    server = Server(url=f"http://127.0.0.1:{port}", name=name, process=process, log=log)
    try:
        wait_until_ready(server)
        yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
        server.kill()


def wait_until_ready(server: Server) -> None:
    """Within a bound; a server that ends early is told with the end of its log."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with suppress(httpx.HTTPError):
            if httpx.get(f"{server.url}/health", timeout=5, trust_env=False).status_code == 200:
                return
        time.sleep(0.5)
    tail = server.log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"vLLM did not become ready (exit code {server.process.poll()}). The end of its log:\n{tail}")
