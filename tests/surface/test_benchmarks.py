"""Benchmarks are run by hand, so what they import is looked at here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
READ = """
import runpy, sys
from pathlib import Path
for path in sorted(Path("benchmarks").glob("*.py")):
    sys.path.insert(0, str(path.parent))  # as `python benchmarks/head.py` does
    runpy.run_path(str(path), run_name="read")
    sys.path.remove(str(path.parent))
"""


def test_every_benchmark_finds_what_it_imports_as_a_module_and_as_a_script() -> None:
    modules = [f"benchmarks.{path.stem}" for path in sorted((ROOT / "benchmarks").glob("[a-z]*.py"))]
    modules += [
        f"benchmarks.gpu_check.{path.stem}" for path in sorted((ROOT / "benchmarks/gpu_check").glob("[a-z]*.py"))
    ]
    code = f"import {', '.join(modules)}\n{READ}"  # one process, as most of the time goes into importing torch
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
