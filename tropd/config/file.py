"""A run as a file: TOML and flags in, complete TOML out.

load(path, flags) -> Run     build(values, source) -> Run     dump(run) -> str     fingerprint(run) -> str
"""

from __future__ import annotations

from tropd.config.run import Run
from tropd.config.tables import parts, to_dict

load = Run.load
build = Run.from_dict
dump = Run.dump
fingerprint = Run.fingerprint

__all__ = ["build", "dump", "fingerprint", "load", "parts", "to_dict"]
