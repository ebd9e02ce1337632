"""The commands of `tropd`: one module each, with `main(argv) -> int`.  They refuse by TropdErrors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from tropd.errors import ConfigError

if TYPE_CHECKING:
    from tropd.config import Run


class Arguments(argparse.ArgumentParser):
    """Refuses in one sentence, as everything else does, instead of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{self.prog}: {message}. See `{self.prog} --help`.")


def read_run(argv: list[str], prog: str) -> Run:
    """RUN.toml and then any flags: the run they describe.  Without a file, `--help` shows the flags."""
    from tropd import config_file

    if argv and not argv[0].startswith("-"):
        return config_file.load(Path(argv[0]), argv[1:])
    if "--help" in argv or "-h" in argv:
        import tyro

        from tropd.config import Run

        tyro.cli(tyro.conf.AvoidSubcommands[Run], args=["--help"], prog=f"{prog} RUN.toml")
    raise ConfigError(f"{prog} needs the file of a run first: `{prog} RUN.toml [--any.flag value]`.")


def new_folder(path: Path) -> Path:
    """A folder that is to be written whole must not be there: what stands in it would be lost."""
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path} exists already, and nothing is overwritten. Name a folder that does not exist.")
    unfinished = path.with_name(path.name + ".tmp")
    if unfinished.exists() or unfinished.is_symlink():
        raise ConfigError(
            f"{unfinished} exists, where {path} would be written first: a command that was killed has left it, or it "
            "is yours. Remove it, or name another folder."
        )
    for above in path.expanduser().resolve().parents:
        if any((above / name).exists() for name in ("config.json", "adapter_config.json", "records.jsonl")):
            raise ConfigError(f"{path} lies in {above}, which holds a model or a run. Name a folder outside of it.")
    return path
