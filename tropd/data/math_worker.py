"""The process in which math-verify runs; started as a script by tropd.data.graders and never imported.

One JSON object per line each way: {"gold", "completion", "seconds", "memory"} -> true, false, or null where the memory
did not do.  Symbolic algebra can take for
ever on what a model writes (9^9^9^9), inside calls that no signal or thread can interrupt: a process can be killed.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from typing import Any


def _limit_time(seconds: float) -> None:
    """End this process a little after the deadline: where its parent is gone, nothing else would."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = int(time.process_time() + seconds) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard < 0 else min(soft, hard), hard))


def _limit_memory(more: int) -> None:
    """Limit memory to so many bytes beyond what the process has now: (10^10)^10^10 would take all of it."""
    try:
        import resource

        with open("/proc/self/statm") as facts:
            pages = int(facts.read().split()[0])
    except (ImportError, OSError):  # only Linux says what a process has
        return
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))


def _is_right(gold: str, completion: str) -> bool:
    from math_verify import parse, verify

    timeout: Any = None  # the parent keeps the time
    expected = parse(gold, parsing_timeout=timeout)
    answer = parse(completion, parsing_timeout=timeout)
    return bool(expected and answer and verify(expected, answer, timeout_seconds=None))


def main() -> None:
    with open(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as replies:
        warnings.simplefilter("ignore")
        if not _is_right("$1$", "$1$"):  # before 0.8 it takes `None` for no time at all, without an error
            raise SystemExit("math-verify does not find that 1 is 1: pip install 'tropd[math]'")
        logging.disable()
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - what the parser prints is not a reply
        print("ready", file=replies, flush=True)
        limited = False
        for line in sys.stdin:
            task = json.loads(line)
            _limit_time(task["seconds"])
            if not limited:
                _limit_memory(task["memory"])
                limited = True
            right: bool | None = False
            try:
                right = _is_right(task["gold"], task["completion"])
            except MemoryError:
                right = None
            except Exception:  # any text may come here, and what cannot be read is not right
                right = False
            print(json.dumps(right), file=replies, flush=True)


if __name__ == "__main__":
    main()
