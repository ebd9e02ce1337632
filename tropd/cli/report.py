"""tropd report RUN... [-o FILE]: one HTML file that opens without a network."""

from __future__ import annotations

import time
from pathlib import Path

from tropd.base.reading import printable
from tropd.cli.arguments import Arguments
from tropd.cli.console import make_console
from tropd.errors import ConfigError

SHOWN_PROBLEMS = 5


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd report", description="Write one HTML file about one run, or about several.")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("-o", "--output", type=Path, help="the file (RUN/report.html; of several runs: report.html)")
    parser.add_argument("--transcripts", type=int, default=1000, help="how many at most, over all runs (1000)")
    asked = parser.parse_args(argv)
    if asked.transcripts < 0:
        raise ConfigError(f"--transcripts is {asked.transcripts}: give a number of transcripts, or 0 for none.")
    output = asked.output or (asked.runs[0] / "report.html" if len(asked.runs) == 1 else Path("report.html"))
    _check(output)
    from tropd.report.groups import judge_groups
    from tropd.report.page import render
    from tropd.report.runs import read_runs
    from tropd.report.transcripts import collect
    from tropd.report.verdict import judge

    start = time.perf_counter()
    runs = read_runs(asked.runs)
    page = render(runs, collect(runs, asked.transcripts))
    _write(output, page)
    console = make_console()
    verdict = judge(runs[0]) if len(runs) == 1 else judge_groups(runs)
    console.print(verdict.headline, markup=False, soft_wrap=True)
    for run in runs:
        for text in run.problems[:SHOWN_PROBLEMS]:
            console.print(f"{run.name}: {printable(text)}", markup=False, soft_wrap=True)
        if len(run.problems) > SHOWN_PROBLEMS:
            more = len(run.problems) - SHOWN_PROBLEMS
            console.print(f"{run.name}: and {more} more of that kind; all are in the report.", markup=False)
    size, seconds = output.stat().st_size / 1e6, time.perf_counter() - start
    console.print(f"Written: {output} ({size:.1f} MB, {seconds:.1f} s)", markup=False, soft_wrap=True)
    return 0


def _check(output: Path) -> None:
    """An old report may be replaced; nothing else."""
    if output.is_dir():
        raise ConfigError(f"{output} is a folder. Name the file that is to be written.")
    if output.exists() and b'<meta name="generator" content="tropd' not in output.read_bytes()[:4000]:
        raise ConfigError(f"{output} exists and is no report of tropd, so it is not overwritten. Name another file.")


def _write(output: Path, page: str) -> None:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        begun = output.with_name(output.name + ".tmp")
        begun.write_text(page, encoding="utf-8")
        begun.replace(output)
    except OSError as error:
        raise ConfigError(f"{output} cannot be written: {error}. Name another file with -o.") from None
