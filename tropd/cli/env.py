"""tropd env [--json]: versions and devices for a bug report, and which versions are outside the tested range."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from tropd.cli.console import ask_json, show
from tropd.version import __version__, packages


def main(argv: list[str]) -> int:
    show(ask_json("env", argv), environment, _picture)
    return 0


def environment() -> dict[str, Any]:
    """What a bug report should say about the machine."""
    return {
        "tropd": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "devices": _devices(),
        "packages": [{**asdict(package), "outside": package.outside} for package in packages()],
    }


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _devices() -> list[str]:
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {gpu.major}.{gpu.minor}" for gpu in found]
    return names + (["mps"] if torch.backends.mps.is_available() else [])


def _picture() -> Group:
    facts = environment()
    about, table = Table.grid(padding=(0, 2)), Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for package in facts.pop("packages"):
        if not table.columns:
            for title in ("package", "here", "tested", ""):
                table.add_column(title, style="dim" if title == "package" else "")
        state = "outside" if package["outside"] else ""
        here = package["installed"] or "not installed"
        table.add_row(package["name"], here, package["tested"], Text(state, style="bold yellow"))
    facts["devices"] = "; ".join(facts["devices"]) or "no GPU"
    for name, value in facts.items():
        about.add_row(Text(name, style="dim"), Text(str(value or "none")))
    return Group(about, "", table)
