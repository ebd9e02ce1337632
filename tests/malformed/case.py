"""One malformed input, and the process in which a command meets it."""

from __future__ import annotations

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

LIMIT_SECONDS = 90.0
"""Of a command: far above what it takes on a busy machine."""
LIMIT_BYTES = 4 * 2**30
"""Of memory beyond what the process has when it begins."""


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    prepare: Callable[[Path], list[str]]
    """Makes the input in an empty folder and says the command."""
    names: str
    """What the answer must name."""
    told: bool = False
    """The command goes on, and what it prints or writes names the input's fault."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    case: Case
    verdict: str
    """fine, traceback, hang, silent, unnamed"""
    said: str


def run(case: Case, folder: Path) -> Outcome:
    """The command in a process of its own, with limits of time and memory."""
    folder.mkdir(parents=True)
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reader)
        _carry_out(case, folder, writer)
    os.close(writer)
    said, code = _wait(process, reader)
    return Outcome(case=case, verdict=_verdict(case, said, code, folder), said=said)


def _carry_out(case: Case, folder: Path, writer: int) -> None:
    code = 99
    try:
        for number in (1, 2):
            os.dup2(writer, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout, sys.stderr = map(_writer, (1, 2))
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + LIMIT_BYTES, now + LIMIT_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        os.environ["COLUMNS"] = "400"  # wide enough for a name in one piece
        from tropd.cli.main import main

        code = main(case.prepare(folder))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _writer(number: int) -> TextIO:
    return open(number, "w", buffering=1, closefd=False)


def _wait(process: int, reader: int) -> tuple[str, int | None]:
    """What it said and its exit code; None where it had to be killed for its time."""
    end, said = time.monotonic() + LIMIT_SECONDS, b""
    while (left := end - time.monotonic()) > 0:
        if select.select([reader], [], [], left)[0]:
            part = os.read(reader, 1 << 16)
            said += part if len(said) < 1 << 20 else b""
            if not part:
                break
    else:
        os.kill(process, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(process, 0)
    return said.decode(errors="replace"), None if left <= 0 else os.waitstatus_to_exitcode(status)


def _verdict(case: Case, said: str, code: int | None, folder: Path) -> str:
    if code is None:
        return "hang"
    if "Traceback" in said or code not in (0, 2):
        return "traceback"
    flat = " ".join(said.split())
    if case.told:
        return "fine" if case.names in flat else "silent"
    if code == 0:
        return "silent"
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if "│ error " in said:  # the doctor's table, which folds lines anywhere
        return "fine" if "".join(case.names.split()) in "".join(said.replace("│", "").split()) else "unnamed"
    named = len(errors) == 1 and case.names in errors[0]
    return "fine" if named else "unnamed"


def run_all(cases: Iterable[Case], folder: Path) -> list[Outcome]:
    return [run(case, folder / f"{number:04d}") for number, case in enumerate(cases)]
