"""python -m benchmarks.gpu_check [--device cuda|cpu] [--only PART ...]

Installs the wheels that this machine lacks, runs the parts and writes gpu_check.json and gpu_check.md to $OUT, or to
runs/gpu-check where that is not set.  Needs torch, transformers and the packages of tropd; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.gpu_check import report, wheels
from benchmarks.gpu_check.plan import GROUPS, LEAST_SECONDS, TOTAL_SECONDS, Part
from benchmarks.gpu_check.report import Result

ROOT = Path(__file__).parents[2]


class Driver:
    """Parts, one group after the other."""

    def __init__(
        self, device: str, groups: Sequence[Sequence[Part]], out: Path, work: Path, seconds: float = TOTAL_SECONDS
    ) -> None:
        self.device, self.groups, self.out, self.work = device, groups, out, work
        self.begun, self.end = time.monotonic(), time.monotonic() + seconds
        self.command = f"python -m benchmarks.gpu_check --device {device}"
        self.results = {p.name: Result(p.name, self._said(p)) for group in groups for p in group}

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def run(self) -> int:
        site = self.work / "site"
        missing = wheels.install(wheels.FOLDER, site)
        wheels.name_tree(site)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(site), *filter(None, [os.environ.get("PYTHONPATH")])]),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(self.work / "hf"),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1" if self.device == "cpu" else "2",
        }
        if missing:
            print("not here and not among the wheels:", ", ".join(missing), flush=True)
        for group in self.groups:
            self._run_group(group, environment)
        wrong = report.failures(list(self.results.values()))
        print((self.out / "gpu_check.md").read_text())
        print(f"{len(wrong)} failed", *wrong, sep="\n  ")
        return 1 if wrong else 0

    def _run_group(self, group: Sequence[Part], environment: dict[str, str]) -> None:
        running: dict[str, tuple[subprocess.Popen[bytes], float, float]] = {}
        for part in group:
            limit = min(part.limit, self.seconds_left)
            if self.seconds_left < LEAST_SECONDS:
                self.results[part.name].status = "not begun: no time left"
                continue
            with open(self._log(part.name), "wb") as log:
                process = subprocess.Popen(
                    self._command(part), cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            now = time.monotonic()
            running[part.name] = process, now, now + limit
            self.results[part.name].status = "running"
        while running:
            for name, (process, begun, end) in list(running.items()):
                over = process.poll() is not None
                if not over and time.monotonic() > end:
                    with suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                if over or process.poll() is not None:
                    del running[name]
                    self._finish(name, "cut off" if not over else "broken" if process.returncode else "done", begun)
            time.sleep(0.1)
        self._write()

    def _finish(self, name: str, status: str, begun: float) -> None:
        result, table = self.results[name], self.work / f"{name}.json"
        result.status, result.seconds = status, round(time.monotonic() - begun, 1)
        result.rows = json.loads(table.read_text()) if table.exists() else []
        if status != "done":
            result.log_end = self._log(name).read_text(errors="replace")[-1500:]
            print(f"{name}: {status}\n{result.log_end}", flush=True)
        print(f"{name}: {status} after {result.seconds:.0f} s, {self.seconds_left:.0f} s left", flush=True)
        self._write()

    def _write(self) -> None:
        known = sorted(self.work.glob("*.machine.json"))
        machine: dict[str, Any] = json.loads(known[0].read_text()) if known else {}
        results = list(self.results.values())
        report.write(self.out, self.device, self.command, machine, results, time.monotonic() - self.begun)
        logs = "".join(
            f"===== {r.name}\n{self._log(r.name).read_text(errors='replace')}\n"
            for r in results
            if self._log(r.name).exists()
        )
        (self.out / "gpu_check.log").write_text(logs[-8_000_000:])

    def _command(self, part: Part) -> list[str]:
        module = "benchmarks.gpu_check.part"
        return [sys.executable, "-m", module, part.name, part.module, self.device, str(self.work), *part.items]

    def _said(self, part: Part) -> str:
        return shlex.join(["python", *self._command(part)[1:6], "FOLDER", *part.items])

    def _log(self, name: str) -> Path:
        return self.work / f"{name}.log"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(GROUPS), default="cuda")
    parser.add_argument("--only", nargs="*", default=(), metavar="PART", help="these parts alone")
    asked = parser.parse_args()
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu-check")
    out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="gpu-check-") as work:
        groups = [[p for p in group if not asked.only or p.name in asked.only] for group in GROUPS[asked.device]]
        return Driver(asked.device, [group for group in groups if group], out, Path(work)).run()


if __name__ == "__main__":
    sys.exit(main())
