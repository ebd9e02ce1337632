"""The `tropd` command: one table of commands, and one way to say no.

A command is `main(argv) -> int` of a module that is imported only when it is asked for.  What tropd refuses is
printed as one paragraph with exit code 2; a traceback means a defect of tropd.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tropd.base.reading import printable
from tropd.base.terminal import PrintableConsole
from tropd.cli import hub_log
from tropd.cli.commands import LINES
from tropd.cli.console import make_console
from tropd.errors import Interrupted, MethodWarning, TropdError

Command = Callable[[list[str]], int] | str
"""The command itself, or the module whose `main` it is."""
COMMANDS: dict[str, tuple[Command, str]] = {name: (f"tropd.cli.{name}", line) for name, line in LINES.items()}

SHARED = ("train", "resume")
"""What several processes (torchrun) do together; of other commands the first process does everything."""


def main(argv: list[str] | None = None, commands: Mapping[str, tuple[Command, str]] = COMMANDS) -> int:
    """Run a command; the number is the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    errors = PrintableConsole(stderr=True, highlight=False)
    if not errors.is_terminal:  # read by transformers too: its bars are noise in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub_log.shorten()
    follows = os.environ.get("RANK", "0") not in ("", "0")  # of several processes, the first speaks for all
    if follows and name not in SHARED:
        return 0
    with _one_line_warnings(PrintableConsole(stderr=True, quiet=True) if follows else errors):
        try:
            if name in ("help", "-h", "--help"):
                make_console().print(_overview(commands))
                return 0
            return _find("version" if name == "--version" else name, commands)(rest)
        except Interrupted as stop:  # said by the run itself
            return 128 + stop.signal
        except TropdError as error:
            if _speaks():
                _say(errors, "error: ", "bold red", " ".join(str(error).split()))
            return 2
        except BrokenPipeError:  # `tropd ... | head`: whoever read has enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:  # of a disk or a name, which no command can foresee everywhere
            if error.filename is None:
                raise
            _say(errors, "error: ", "bold red", f"{printable(str(error.filename))}: {error.strerror}.")
            return 2
        except KeyboardInterrupt:
            _say(errors, "", "", "interrupted")
            return 130
        except SystemExit as stop:  # tyro and argparse leave this way after --help and after a wrong flag
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def _speaks() -> bool:
    """Whether this process tells the user why it ends: what all refuse is told once."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return True
    from tropd.distributed.launch import speaks_first

    return speaks_first()


def _find(name: str, commands: Mapping[str, tuple[Command, str]]) -> Callable[[list[str]], int]:
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise TropdError(f"there is no command {name!r}.{hint} Known: {', '.join(commands)}.")
    command, _ = commands[name]
    return importlib.import_module(command).main if isinstance(command, str) else command


def _overview(commands: Mapping[str, tuple[Command, str]]) -> Table:
    table = Table(title="tropd COMMAND [--help]", title_style="bold", title_justify="left", box=None, show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column()
    for name, (_, line) in commands.items():
        table.add_row(name, Text(line))
    return table


def _say(console: Console, label: str, style: str, text: str) -> None:
    # soft_wrap: a message stays one line in a log; a terminal wraps it by itself.
    console.print(Text(label, style=style).append(printable(text), style="not bold default"), soft_wrap=True)


@contextmanager
def _one_line_warnings(console: Console) -> Iterator[None]:
    """A method's objection is one line, once; other warnings keep their usual form."""
    said: set[str] = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", MethodWarning)
        # Said by one library to the authors of another: nothing that whoever types a command could change.
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\b")

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            text = " ".join(str(message).split())
            if not issubclass(category, MethodWarning):
                usual(message, category, *place)
            elif text not in said:
                said.add(text)
                _say(console, "warning: ", "bold yellow", text)

        warnings.showwarning = show
        yield
