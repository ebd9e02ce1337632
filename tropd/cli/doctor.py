"""tropd doctor RUN.toml [--any.flag value]: says what will go wrong with a run, and what to change.

Exit code: 0 when nothing is wrong, 2 when something is; warnings alone count (as 1) only with --strict.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from tropd.base.reading import printable
from tropd.cli.arguments import TRUST, Arguments, read_run, with_its_code
from tropd.cli.console import make_console
from tropd.errors import ConfigError, MethodWarning

if TYPE_CHECKING:
    from tropd.doctor.check import Check

_STYLE = {"ok": "green", "warning": "yellow", "error": "bold red"}


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd doctor", add_help=False, allow_abbrev=False)
    parser.add_argument("--strict", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument(TRUST, action="store_true")
    parser.add_argument("--sample-prompts", type=int, default=8)
    parser.add_argument("--sample-tokens", type=int, default=64)
    asked, rest = parser.parse_known_args(argv)
    if rest in (["-h"], ["--help"]):
        print(
            "tropd doctor RUN.toml [--strict] [--json] [--sample-prompts N] [--sample-tokens N] [--any.key value]\n\n"
            "--strict            exit with 1 when there are warnings\n"
            "--json              the checks as JSON\n"
            f"{TRUST}        run the code that the run file names: models' (trust_remote_code) and your own\n"
            "--sample-prompts N  answers drawn and trained on (8); 0 loads no weights\n"
            "--sample-tokens N   tokens of each (64)\n\n"
            "Any other flag changes the run: `tropd train RUN.toml --help` lists them."
        )
        return 0
    if asked.sample_prompts < 0 or asked.sample_tokens < 1:
        raise ConfigError("--sample-prompts is at least 0 and --sample-tokens at least 1.")
    checks = _examine(rest, asked.sample_prompts, asked.sample_tokens, asked.trust_code)
    levels = {check.level for check in checks}
    code = 2 if "error" in levels else int("warning" in levels and asked.strict)
    if asked.json:
        print(json.dumps({"exit_code": code, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        _show(checks)
    return code


def _examine(argv: Sequence[str], num_prompts: int, max_new_tokens: int, trusted: bool) -> list[Check]:
    """A file that makes no run is a finding like any other."""
    from tropd.doctor.check import error, warning
    from tropd.doctor.examination import examine

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always", MethodWarning)
        try:
            run, notes = with_its_code(read_run(list(argv), "tropd doctor"), trusted, writes=True)
        except ConfigError as refusal:
            return [error("configuration", str(refusal))]
    said = dict.fromkeys(str(w.message) for w in heard if issubclass(w.category, MethodWarning))
    checks = [warning("method", text, "") for text in said] + [warning("code", text, "") for text in notes]
    return checks + examine(run, num_prompts=num_prompts, max_new_tokens=max_new_tokens)


def _show(checks: Sequence[Check]) -> None:
    console = make_console()
    table = Table("check", "", "what was found, and what to do", show_lines=True)
    for check in checks:
        said = Text(printable(check.found, lines=True))
        if check.advice:
            said.append(f"\n{printable(check.advice, lines=True)}", style="bold")
        table.add_row(Text(printable(check.name)), Text(check.level, style=_STYLE[check.level]), said)
    console.print(table)
    count = {level: sum(check.level == level for check in checks) for level in _STYLE}
    console.print(f"{count['ok']} ok, {count['warning']} warnings, {count['error']} errors")
