"""`make gpu-check` runs from end to end on a CPU, at tiny sizes, and tells what it has when it is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_check import wheels
from benchmarks.gpu_check.__main__ import Driver
from benchmarks.gpu_check.plan import GROUPS, Part

ROOT = Path(__file__).parents[2]
BARS = [f"H{i}" for i in range(1, 13)]


def told(out: Path) -> dict[str, dict[str, Any]]:
    """What the JSON says of each part."""
    return {part["name"]: part for part in json.loads((out / "gpu_check.json").read_text())["parts"]}


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OUT": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    parts = told(tmp_path)
    assert {name: part["status"] for name, part in parts.items()} == {p.name: "done" for g in GROUPS["cpu"] for p in g}
    rows = [row for part in parts.values() for row in part["rows"]]
    assert {bar for bar in BARS if any(row["what"].startswith(f"{bar} ") for row in rows)} == set(BARS)
    assert {row["what"][:2] for row in rows if row["verdict"] == "not run"} == {"H4", "H5"}
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_check.json", "gpu_check.md", "gpu_check.log"}


@pytest.mark.slow
def test_a_run_that_is_cut_off_tells_what_it_has(tmp_path):
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    first = (Part(name="endless", module="train", limit=1), Part(name="sharded", module="sharded", limit=120))
    second = (Part(name="broken", module="nothing", limit=120),)
    assert Driver("cpu", [first, second], out, work, seconds=130).run() == 1
    parts = told(out)
    assert {name: part["status"] for name, part in parts.items()} == {
        "endless": "cut off",
        "sharded": "done",
        "broken": "broken",
    }
    assert all(row["verdict"] == "passed" for row in parts["sharded"]["rows"]) and len(parts["sharded"]["rows"]) == 4
    assert "No module named 'benchmarks.gpu_check.nothing'" in parts["broken"]["log_end"]
    assert "| **endless** | 1 s | | cut off |" in (out / "gpu_check.md").read_text()


def test_parts_that_no_time_is_left_for_are_not_begun(tmp_path):
    groups = [[Part(name="heads", module="heads", limit=60)]]
    assert Driver("cpu", groups, tmp_path, tmp_path, seconds=5).run() == 0
    assert told(tmp_path)["heads"]["status"] == "not begun: no time left"


def test_the_order_is_that_of_importance_and_timed_parts_run_alone():
    names = [[part.name for part in group] for group in GROUPS["cuda"]]
    assert {"checks-kernels", "checks-generation", "matrix-bfloat16"} <= set(names[0])
    assert names[1:5] == [["heads"], ["decode"], ["whole"], ["packed"]]


def test_wheels_are_of_the_tested_set_and_those_that_are_missing_are_named(tmp_path):
    assert wheels.versions().keys() == set(wheels.WHEELS)
    site = tmp_path / "site"
    assert wheels.install(tmp_path, site) == []  # all of them are here
    wheels.name_tree(site)
    assert [path.name for path in site.iterdir()] == [f"tropd-{version('tropd')}.dist-info"]
