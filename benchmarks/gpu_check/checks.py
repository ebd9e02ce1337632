"""The tests marked `gpu`, which pytest runs too, without pytest (`tests/gpu/checks.py`)."""

from __future__ import annotations

import time
import traceback

from benchmarks.gpu_check.sizes import Sizes
from benchmarks.gpu_check.table import FAILED, NOT_RUN, PASSED, Row, Table
from tests.gpu.checks import GROUPS


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    for name, check in (case for group in items for case in GROUPS[group](s.device)):
        begun, verdict, note = time.perf_counter(), PASSED, ""
        try:
            check()
        except ImportError as error:
            verdict, note = NOT_RUN, str(error)
        except Exception as error:
            traceback.print_exc()
            verdict, note = FAILED, f"{type(error).__name__}: {str(error).strip()[:300]}"
        table.add(Row(what=name, verdict=verdict, note=note, numbers={"seconds": time.perf_counter() - begun}))
