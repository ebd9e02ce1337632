"""The results as one JSON file and one Markdown table, written anew whenever a part is over."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """How a part ended."""

    name: str
    command: str
    status: str = "waiting"
    """waiting, running, done, cut off, broken, or why it was not begun."""
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    log_end: str = ""
    """The last lines of a part that broke."""


def failures(results: list[Result]) -> list[str]:
    """What is wrong, a line each: checks that failed and parts that broke."""
    lines = [f"{r.name}: {r.status}" for r in results if r.status == "broken"]
    return lines + [
        f"{r.name}: {row['what']}: {row['note']}" for r in results for row in r.rows if row["verdict"] == "FAILED"
    ]


def write(folder: Path, device: str, command: str, machine: dict[str, Any], results: list[Result], took: float) -> None:
    whole = {
        "device": machine.get("device", device),
        "command": command,
        "seconds": round(took, 1),
        "machine": machine,
        "failures": failures(results),
        "parts": [vars(result) for result in results],
    }
    _replace(folder / "gpu_check.json", json.dumps(whole, indent=1, default=str) + "\n")
    _replace(folder / "gpu_check.md", markdown(whole, results))


def markdown(whole: dict[str, Any], results: list[Result]) -> str:
    machine = ", ".join(f"{name} {value}" for name, value in whole["machine"].items() if name != "device")
    lines = [
        f"**{whole['device']}**: {machine}. `{whole['command']}`, {whole['seconds']:.0f} s.",
        "",
        "| | measured | bar | | |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        lines.append(f"| **{result.name}** | {result.seconds:.0f} s | | {result.status} | `{result.command}` |")
        for row in result.rows:
            cells = [row["what"], row["value"], row["bar"], row["verdict"], row["note"]]
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    whole = path.with_suffix(path.suffix + ".tmp")
    whole.write_text(text)
    whole.replace(path)
