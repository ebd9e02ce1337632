"""A long run: whether memory and open files stay what they are.

    python benchmarks/soak.py                  3,000 steps of TrOPD on the nano pair, everything in this process
    python benchmarks/soak.py --servers        student and teacher on small servers of tests.servers, in processes of
                                               their own, which are killed and started again every 100 steps

Resident memory and open files of the trainer are read after every step.  Texts, checkpoints, kept rollouts and
evaluations are those of an ordinary run.  The exit code is 1 where the last quarter holds more than the second one, by
more than `--allowed` of it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import tyro
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.servers.mini import MiniServer
from tropd.config.run import Run
from tropd.monitoring.display import Silent
from tropd.run.start import train
from tropd.testbeds import embedded
from tropd.types import StepRecord

PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Settings:
    steps: int = 3000
    servers: bool = False
    restart_every: int = 100
    """Steps after which the servers are killed and started again."""
    num_prompts: int = 8
    new_tokens: int = 28
    allowed: float = 0.02
    output: Path | None = None
    """Where the measurements of every step are written, as JSON."""


class Server:
    """A small server at an address of its own, which may go away and come back."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port, self.process = folder, port, None
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        process = multiprocessing.get_context("spawn").Process(target=serve, args=(self.folder, self.port), daemon=True)
        process.start()
        self.process = process

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process.close()


def serve(folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    with MiniServer(folder, port=port):
        signal.pause()


class Meter(Silent):
    """Measures after every step, and restarts the servers when their time has come."""

    def __init__(self, settings: Settings, servers: list[Server]) -> None:
        self.settings, self.servers = settings, servers
        self.seen: list[tuple[float, int]] = []
        self.begun = time.monotonic()

    def update(self, record: StepRecord) -> None:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 1e6
        self.seen.append((resident, len(os.listdir("/proc/self/fd"))))
        done = record.step + 1
        if done % 100 == 0:
            minutes = (time.monotonic() - self.begun) / 60
            print(f"step {done}: {resident:.0f} MB, {self.seen[-1][1]} files, {minutes:.1f} min", flush=True)
        if self.servers and done % self.settings.restart_every == 0 and done < self.settings.steps:
            for server in self.servers:
                server.stop()
                server.start()


def write_pair(folder: Path) -> tuple[Path, Path]:
    """Student and teacher without padded rows: small servers give such rows a share, and trainers do not."""
    pair = embedded("nano-mild")
    places = folder / "student", folder / "teacher"
    for source, place in zip((pair.student, pair.teacher), places, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return places


def values_of(settings: Settings, folder: Path, models: tuple[Path, Path], urls: list[str]) -> dict[str, Any]:
    pair = embedded("nano-mild")
    values: dict[str, Any] = {
        "steps": settings.steps,
        "output": str(folder / "run"),
        "grader": "chain",
        "student": {"path": str(models[0])},
        "teacher": {"path": str(models[1])},
        "data": {"path": str(pair.prompts)},
        "method": {"name": "tropd", "top_k": 4},
        "rollout": {
            "num_prompts": settings.num_prompts,
            "num_rollouts": 1,
            "max_new_tokens": settings.new_tokens,
            "save_every": 50,
        },
        "optimizer": {"learning_rate": 1e-4},
        "checkpoint": {"every": 100},
        "evaluation": {
            "every": 500,
            "num_samples": 1,
            "max_new_tokens": settings.new_tokens,
            "data": {"path": str(pair.held_out), "limit": 16},
        },
    }
    if urls:
        patience = {"deadline_seconds": 120.0}
        values["rollout"] |= {"servers": urls[:1], "server": patience}
        values["teacher"] |= {"servers": urls[1:], "server": patience}
    return values


def main(settings: Settings) -> int:
    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        models, servers = write_pair(folder), []
        if settings.servers:
            for number, model in enumerate(models):
                servers.append(Server(model, 18100 + os.getpid() % 800 * 2 + number))
                stack.callback(servers[-1].stop)
        meter = Meter(settings, servers)
        run = Run.from_dict(values_of(settings, folder, models, [server.url for server in servers]), "soak")
        train(run, display=meter)
    if settings.output is not None:
        settings.output.write_text(json.dumps(meter.seen))
    quarters = [meter.seen[n * len(meter.seen) // 4 : (n + 1) * len(meter.seen) // 4] for n in range(4)]
    memory = [statistics.fmean(resident for resident, _ in quarter) for quarter in quarters]
    files = [max(number for _, number in quarter) for quarter in quarters]
    print(f"resident memory by quarter: {', '.join(f'{x:.1f}' for x in memory)} MB; open files: {files}")
    flat = memory[3] <= memory[1] * (1 + settings.allowed) and files[3] <= files[1]
    print("flat" if flat else "NOT FLAT")
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
