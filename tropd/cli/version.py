"""tropd version: the version of tropd alone."""

from __future__ import annotations

from tropd.cli.console import ask
from tropd.version import __version__


def main(argv: list[str]) -> int:
    ask("version", argv, _no_flags)
    print(__version__)
    return 0


def _no_flags() -> None:
    pass
