"""tropd methods [--json]: the methods there are."""

from __future__ import annotations

from tropd.cli.console import ask_json, show
from tropd.methods import explain


def main(argv: list[str]) -> int:
    show(ask_json("methods", argv), explain.methods_as_data, explain.methods)
    return 0
