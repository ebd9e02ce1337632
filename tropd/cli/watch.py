"""tropd watch RUN...: the report of runs that go on, live in a browser on this machine."""

from __future__ import annotations

from pathlib import Path

from tropd.cli.arguments import Arguments
from tropd.cli.console import make_console


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd watch", description="Serve the report of runs while they go on.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN", help="the folder of a run, which may not exist yet"
    )
    parser.add_argument("--port", type=int, default=0, help="a port on 127.0.0.1 (any that is free)")
    parser.add_argument("--transcripts", type=int, default=300, help="how many at most, over all runs (300)")
    asked = parser.parse_args(argv)
    from tropd.errors import require
    from tropd.report.history import History
    from tropd.report.live import Server, Watched
    from tropd.report.runs import check_run, names_of

    for package in ("jinja2", "plotly"):
        require(package, "report", "watching a run")
    console = make_console()
    for run in asked.runs:
        if run.exists():
            check_run(run)
        else:
            console.print(f"{run} does not exist yet: waiting for it.", markup=False, soft_wrap=True)
    histories = [History(directory=run, name=name) for run, name in zip(asked.runs, names_of(asked.runs), strict=True)]
    with Server(Watched(histories, max(asked.transcripts, 0)), asked.port) as server:
        console.print(f"Watching at {server.url} until Ctrl-C.", markup=False, soft_wrap=True)
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            console.print("Stopped watching; the run goes on.")
    return 0
