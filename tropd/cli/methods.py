"""tropd methods [--method NAME] [--json]: the methods there are, in tropd and in installed packages."""

from __future__ import annotations

from typing import Annotated

import tyro

from tropd.cli.console import AsJson, ask, show
from tropd.methods import explain


def main(argv: list[str]) -> int:
    own, as_json = ask("methods", argv, _flags)
    show(as_json, lambda: explain.methods_as_data(own), lambda: explain.methods(own))
    return 0


def _flags(
    method: Annotated[tuple[str, ...], tyro.conf.arg(help="your own beside them: file.py:Class")] = (),
    as_json: AsJson = False,
) -> tuple[tuple[str, ...], bool]:
    return method, as_json
