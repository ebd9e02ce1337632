"""tropd resume DIR [--step N] [--steps N]: go on from the newest checkpoint, or from that of a step."""

from __future__ import annotations

from pathlib import Path

from tropd.cli.arguments import Arguments


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd resume", description="Go on with a run from its newest checkpoint.")
    parser.add_argument("directory", type=Path, help="the run's folder")
    parser.add_argument("--step", type=int, help="go on from the checkpoint of this step")
    parser.add_argument("--steps", type=int, help="how many steps the whole run shall have, instead of those it had")
    asked = parser.parse_args(argv)
    from tropd.run.start import resume

    resume(asked.directory, step=asked.step, steps=asked.steps)
    return 0
