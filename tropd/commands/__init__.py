"""The commands of `tropd`: one module each, with `main(argv) -> int`.  They refuse by TropdErrors."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tropd.errors import ConfigError
from tropd.reading import check_path

if TYPE_CHECKING:
    from tropd.config import Run


class Arguments(argparse.ArgumentParser):
    """Refuses in one sentence, as everything else does, instead of printing its usage and leaving."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            for path in value if isinstance(value, list) else [value]:
                if isinstance(path, Path):
                    check_path(path, name)
        return found, rest

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
    if path.exists():
        raise ConfigError(f"{path} exists already, and nothing is overwritten. Name a folder that does not exist.")
    return path
