"""math-verify in a process of its own, which is killed and started again when an expression takes too long."""

from __future__ import annotations

import atexit
import importlib.util
import json
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from tropd.errors import DataError


class MathProcess:
    """Compares one pair at a time, within `seconds` and `memory` bytes beyond what the library itself takes."""

    def __init__(self, seconds: float, memory: int) -> None:
        self.seconds, self.memory = seconds, memory
        self._lock = threading.Lock()
        self._worker: subprocess.Popen[str] | None = None
        atexit.register(self.close)

    def compare(self, gold: str, completion: str) -> bool | None:
        """Whether the two are equal; None where the limits do not allow an answer."""
        task = {"gold": gold, "completion": completion, "seconds": self.seconds, "memory": self.memory}
        with self._lock:
            return self._ask(task)

    def require(self) -> None:
        """Refuse at once when math-verify is not installed."""
        if importlib.util.find_spec("math_verify") is None:
            raise DataError("grader 'math' needs math-verify, which is not installed. Run: pip install 'tropd[math]'")

    def close(self) -> None:
        if self._worker is not None:
            self._worker.kill()
            for pipe in _pipes(self._worker):
                with suppress(BrokenPipeError):
                    pipe.close()
            self._worker.wait()
            self._worker = None

    def _ask(self, task: Mapping[str, Any]) -> bool | None:
        worker = self._start()
        requests, replies = _pipes(worker)
        deadline = threading.Timer(self.seconds, worker.kill)
        deadline.start()
        try:
            requests.write(json.dumps(task) + "\n")
            requests.flush()
            reply = replies.readline()
        except BrokenPipeError:
            reply = ""
        finally:
            deadline.cancel()
        if not reply:
            self.close()
            return None
        return json.loads(reply)

    def _start(self) -> subprocess.Popen[str]:
        if self._worker is None or self._worker.poll() is not None:
            self.close()
            self.require()
            script = str(Path(__file__).with_name("math_worker.py"))
            # -P: modules beside the script must not hide those of the library
            command = [sys.executable, "-P", script]
            self._worker = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", errors="strict"
            )
            if _pipes(self._worker)[1].readline().strip() != "ready":
                code = self._worker.wait()
                self._worker = None
                raise DataError(f"grader 'math': its process ended with code {code}; what it said stands above.")
        return self._worker


def _pipes(worker: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert worker.stdin is not None and worker.stdout is not None
    return worker.stdin, worker.stdout
