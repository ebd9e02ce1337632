"""tropd compare LAB.toml: methods x learning rates x seeds x testbeds, resumable, with intervals."""

from __future__ import annotations

import argparse
import os
import re
import time
from importlib.util import find_spec
from pathlib import Path

from tropd.base.reading import nearest
from tropd.cli.arguments import Arguments
from tropd.cli.console import make_console
from tropd.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("lab", type=Path, metavar="LAB.toml", help="what to compare; see docs/compare.md")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0: one for each core")
    parser.add_argument("--tables", action="store_true", help="show what is known already, and run nothing")
    parser.add_argument(
        "--into", type=Path, metavar="PAGE.md", help="also put the tables between <!-- lab NAME --> and <!-- /lab -->"
    )
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="run these only, by their names there")
    parser.add_argument("--minutes", type=float, help="start no trial after that; the same line goes on later")
    parser.add_argument("--no-figures", action="store_true", help="draw no learning curves")
    asked = parser.parse_args(argv)
    if asked.workers < 0:
        raise ConfigError(f"--workers is {asked.workers}: give a number of processes, or 0 for one for each core.")
    if asked.into is not None:
        _marks(asked.into, asked.lab.stem)  # refused now, not after an hour
    _compare(asked)
    return 0


def _compare(asked: argparse.Namespace) -> None:
    import torch

    from tropd.laboratory.lab import load_lab, trials
    from tropd.laboratory.runner import compare, read_outcomes
    from tropd.laboratory.tables import sheets

    path, page, figures = asked.lab, asked.into, not asked.no_figures
    if figures and find_spec("matplotlib") is None:
        raise ConfigError("figures need matplotlib: pip install 'tropd[plot]', or --no-figures.")
    torch.set_num_threads(1)
    lab, console, started = load_lab(path), make_console(), time.perf_counter()
    directory = Path(lab.output)
    if unknown := [name for name in asked.methods if name not in lab.methods]:
        raise ConfigError(f"{path} has no method {unknown[0]!r}{nearest(unknown[0], lab.methods)}.")
    if asked.tables:
        known = read_outcomes(directory / "results.jsonl")
        outcomes = [known[trial.key] for trial in trials(lab) if trial.key in known]
    else:
        outcomes = compare(
            lab,
            workers=asked.workers or len(os.sched_getaffinity(0)),
            tell=lambda line: console.print(line, soft_wrap=True, markup=False),
            only=asked.methods,
            minutes=asked.minutes,
        )
    if not outcomes:
        raise ConfigError(f"{directory} holds no outcomes yet. Run: tropd compare {path}")
    found = sheets(lab, outcomes)
    for sheet in found:
        console.print(sheet.shown())
    written = [directory / "tables.md", directory / "results.jsonl"]
    written[0].write_text("\n".join(sheet.markdown() for sheet in found))
    if page is not None:
        before, after = _marks(page, path.stem)
        page.write_text(before + "\n" + written[0].read_text() + after)
        written.append(page)
    if figures:
        from tropd.laboratory.figures import draw

        written += draw(lab, outcomes, directory)
    console.print(
        f"{time.perf_counter() - started:.0f} s. Written: {', '.join(map(str, written))}", soft_wrap=True, markup=False
    )


def _marks(page: Path, name: str) -> tuple[str, str]:
    """What stands before and after the tables of a comparison."""
    text = page.read_text() if page.exists() else ""
    found = re.search(rf"(.*<!-- lab {re.escape(name)} -->\n).*?(<!-- /lab -->.*)", text, re.DOTALL)
    if found is None:
        raise ConfigError(f"{page} has no lines '<!-- lab {name} -->' and '<!-- /lab -->' to put the tables between.")
    return found.group(1), found.group(2)
