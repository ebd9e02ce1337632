"""tropd train RUN.toml [--any.flag value] [--overwrite]: train from the start, in a new folder."""

from __future__ import annotations

import os
import re

from tropd.base.terminal import tell
from tropd.cli.arguments import Arguments, read_run
from tropd.errors import ConfigError


def main(argv: list[str]) -> int:
    parser = Arguments(prog="tropd train", add_help=False, allow_abbrev=False)
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME")
    parser.add_argument("--overwrite", action="store_true")
    asked, rest = parser.parse_known_args(argv)
    if rest in (["-h"], ["--help"]):
        print("--push-to-hub OWNER/NAME uploads the finished student to the Hugging Face hub.")
        print("--overwrite replaces a run that the folder holds, once the new one has begun.")
    run = read_run(rest, "tropd train")
    if asked.push_to_hub:
        _check_hub(asked.push_to_hub)
    from tropd.run.start import train

    directory = train(run, overwrite=asked.overwrite)
    if asked.push_to_hub and os.environ.get("RANK", "0") in ("", "0"):  # of several processes one pushes
        from tropd.checkpoints.export import push

        if not (directory / "model").is_dir():
            tell(f"nothing was pushed to {asked.push_to_hub}: the run has not finished.")
            return 0
        tell(f"pushed to {push(directory / 'model', asked.push_to_hub)}")
    return 0


def _check_hub(repository: str) -> None:
    """Refuse before hours of training what could only fail after them."""
    from huggingface_hub import get_token

    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise ConfigError(f"--push-to-hub is {repository!r}; give OWNER/NAME.")
    if get_token() is None:
        raise ConfigError(
            f"--push-to-hub {repository} was asked for, but nobody is logged in. Run `hf auth login`, or set HF_TOKEN."
        )
