"""What commands print on, and the flags of those that have no other than --json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import tyro
from rich.console import Console, RenderableType

from tropd.base.terminal import PrintableConsole
from tropd.cli.commands import LINES

AsJson = Annotated[bool, tyro.conf.arg(name="json", help="as JSON")]


def make_console() -> Console:
    """As wide as the terminal; a pipe has no width, so what is written there has a readable one."""
    console = PrintableConsole(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else PrintableConsole(highlight=False, width=120)


def show(as_json: bool, data: Callable[[], Any], picture: Callable[[], RenderableType]) -> None:
    if as_json:
        print(json.dumps(data(), indent=2))
    else:
        make_console().print(picture())


def ask(command: str, argv: Sequence[str], flags: Callable[..., Any]) -> Any:
    """What `flags` makes of the arguments of `tropd command`."""
    once = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(flags, args=argv, prog=f"tropd {command}", description=LINES[command], config=once)


def ask_json(command: str, argv: Sequence[str]) -> bool:
    """Whether a command without any other flag is to answer as JSON."""
    return ask(command, argv, _json_flag)


def _json_flag(as_json: AsJson = False) -> bool:
    return as_json
