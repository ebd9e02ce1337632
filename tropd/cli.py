"""The `tropd` command: one table of commands, and one way to say no.

A command is `main(argv) -> int`, here or in a module that is imported only when it is asked for.  What tropd refuses is
printed as one paragraph with exit code 2; a traceback means a defect of tropd.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

import tyro
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from tropd import hub
from tropd.errors import MethodWarning, TropdError
from tropd.reading import printable
from tropd.terminal import PrintableConsole

Command = Callable[[list[str]], int] | str
"""The command itself, or the module whose `main` it is."""


def methods(argv: list[str]) -> int:
    """The methods there are."""
    as_json = ask_json("tropd methods", argv)
    from tropd.methods import explain as of

    show(as_json, of.methods_as_data, of.methods)
    return 0


def explain(argv: list[str]) -> int:
    """One method in full."""
    name, as_json = _ask("tropd explain", argv, _explain_flags)
    from tropd.methods import explain as of

    show(as_json, lambda: of.explain_as_data(name), lambda: of.explain(name))
    return 0


def version(argv: list[str]) -> int:
    """The version of tropd alone."""
    _ask("tropd version", argv, _no_flags)
    import tropd

    print(tropd.__version__)
    return 0


COMMANDS: dict[str, tuple[Command, str]] = {
    "demo": ("tropd.commands.demo", "OPD and TrOPD side by side on a small teacher and student: a minute on a laptop"),
    "compare": ("tropd.commands.compare", "methods side by side: testbeds x learning rates x seeds, with intervals"),
    "exact": ("tropd.commands.exact", "methods on tables of logits, where every divergence is a sum"),
    "methods": (methods, "the methods: name, paper, evidence they need"),
    "explain": (explain, "a method in full: equation, terms, evidence, knobs, readings"),
    "doctor": ("tropd.commands.doctor", "what will go wrong with a run, and what to change"),
    "plan": ("tropd.commands.plan", "memory, time and servers that a run will need elsewhere"),
    "train": ("tropd.commands.train", "train from a run file"),
    "resume": ("tropd.commands.resume", "go on from the newest checkpoint of a run"),
    "launch": (
        "tropd.commands.launch",
        "a run as several processes: on a Ray cluster, or lines for torchrun and SLURM",
    ),
    "evaluate": ("tropd.commands.evaluate", "draw answers, grade them, say how sure the score is"),
    "score": ("tropd.commands.score", "what student and teacher say of rollouts in a file"),
    "report": ("tropd.commands.report", "one HTML file about one run or several: verdict, charts, tokens"),
    "watch": ("tropd.commands.watch", "the same report, live in a browser while a run goes on"),
    "inspect": ("tropd.commands.inspect", "a step that was kept: its terms and its worst tokens"),
    "export": ("tropd.commands.export", "a checkpoint as a Hugging Face folder"),
    "merge": ("tropd.commands.merge", "an adapter and its base as one plain model"),
    "env": ("tropd.commands.env", "versions and devices, and what tropd was run with: for a bug report"),
    "version": (version, "the version of tropd"),
}


SHARED = ("train", "resume")
"""What several processes (torchrun) do together; of other commands the first process does everything."""


def main(argv: list[str] | None = None, commands: Mapping[str, tuple[Command, str]] = COMMANDS) -> int:
    """Run a command; the number is the exit code."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["help"]
    errors = PrintableConsole(stderr=True, highlight=False)
    if not errors.is_terminal:  # read by transformers too: its bars are noise in a log
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    hub.say_once()
    follows = os.environ.get("RANK", "0") not in ("", "0")  # of several processes, the first speaks for all
    if follows and name not in SHARED:
        return 0
    with _one_line_warnings(PrintableConsole(stderr=True, quiet=True) if follows else errors):
        try:
            if name in ("help", "-h", "--help"):
                make_console().print(_overview(commands))
                return 0
            return _find("version" if name == "--version" else name, commands)(rest)
        except TropdError as error:
            if _speaks():
                _say(errors, "error: ", "bold red", _paragraph(error))
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
    from tropd.student.launch import speaks_first

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


def _paragraph(error: TropdError) -> str:
    """What kind of refusal it is, from the class itself, then the message, without line breaks of their own."""
    kind = type(error).__dict__.get("__doc__") if type(error) is not TropdError else None
    words = " ".join(str(error).split())
    if not kind:
        return words
    meaning = kind.split("\n")[0].strip().rstrip(".")
    return f"{meaning[0].lower()}{meaning[1:]}: {words}"


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


AsJson = Annotated[bool, tyro.conf.arg(name="json", help="as JSON")]


def _no_flags() -> None:
    pass


def _json_flag(as_json: AsJson = False) -> bool:
    return as_json


def _explain_flags(
    method: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD", help="a name that `tropd methods` lists")
    ],
    as_json: AsJson = False,
) -> tuple[str, bool]:
    return method, as_json


def _ask(prog: str, argv: Sequence[str], flags: Callable[..., Any]) -> Any:
    line = COMMANDS[prog.split()[1]][1]
    return tyro.cli(flags, args=argv, prog=prog, description=line, config=(tyro.conf.FlagCreatePairsOff,))


def ask_json(prog: str, argv: Sequence[str]) -> bool:
    """Whether a command without any other flag is to answer as JSON."""
    return _ask(prog, argv, _json_flag)


def show(as_json: bool, data: Callable[[], Any], picture: Callable[[], RenderableType]) -> None:
    if as_json:
        print(json.dumps(data(), indent=2))
    else:
        make_console().print(picture())


def make_console() -> Console:
    """As wide as the terminal; a pipe has no width, so what is written there has a readable one."""
    console = PrintableConsole(highlight=False)
    return console if console.is_terminal or "COLUMNS" in os.environ else PrintableConsole(highlight=False, width=120)
