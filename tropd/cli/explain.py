"""tropd explain METHOD [--json]: one method in full."""

from __future__ import annotations

from typing import Annotated

import tyro

from tropd.cli.console import AsJson, ask, show
from tropd.methods import explain


def main(argv: list[str]) -> int:
    name, as_json = ask("explain", argv, _flags)
    show(as_json, lambda: explain.explain_as_data(name), lambda: explain.explain(name))
    return 0


def _flags(
    method: Annotated[
        str,
        tyro.conf.Positional,
        tyro.conf.arg(metavar="METHOD", help="of `tropd methods`, or file.py:Class"),
    ],
    as_json: AsJson = False,
) -> tuple[str, bool]:
    return method, as_json
