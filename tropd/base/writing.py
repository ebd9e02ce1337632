"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, also where several processes do so at once."""
    whole = path.with_name(f".{path.name}.{os.getpid()}")
    whole.write_text(text)
    whole.replace(path)
