"""The commands of `tropd`: one module each, with `main(argv) -> int`.  They refuse by TropdErrors."""

from __future__ import annotations

import argparse
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tropd.base.names import is_name
from tropd.base.reading import check_path
from tropd.errors import ConfigError

if TYPE_CHECKING:
    from tropd.config.run import Run


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
    from tropd.config.run import Run

    if argv and not argv[0].startswith("-"):
        return Run.load(Path(argv[0]), argv[1:])
    if "--help" in argv or "-h" in argv:
        import tyro

        tyro.cli(tyro.conf.AvoidSubcommands[Run], args=["--help"], prog=f"{prog} RUN.toml")
    raise ConfigError(f"{prog} needs the file of a run first: `{prog} RUN.toml [--any.flag value]`.")


TRUST = "--trust-code"


def without_code(run: Run, trusted: bool) -> tuple[Run, list[str]]:
    """The run as commands see it that do not train, and what was left out: code that comes with a model, or that the
    run file names, is run only where the command line asks for it."""
    if trusted:
        return run.imported(), []
    from tropd.briefings.briefing import OwnBriefing
    from tropd.config.models import TeacherConfig
    from tropd.methods import NamedMethod

    models = {"student": run.student, "teacher": run.teacher}
    models |= {f"teachers.{name}": x for name, x in run.teachers.items()}
    models |= {f"readers.{name}": x for name, x in run.readers.items()}
    own = {"grader": run.grader, "evaluation.grader": run.evaluation.grader}
    own |= {"method.name": run.method.name if isinstance(run.method, NamedMethod) else None}
    own |= {f"{whose}.path": model.path for whose, model in models.items() if whose != "student"}
    own |= {
        f"{whose}.briefing": model.briefing.kind
        for whose, model in models.items()
        if isinstance(model, TeacherConfig) and isinstance(model.briefing, OwnBriefing)
    }
    own = {
        name: x for name, x in own.items() if x and (is_name(x) or name == "method.name" or name.endswith(".briefing"))
    }
    own |= run.own_parts
    notes = [
        f"{whose}.trust_remote_code is set, but code of {model.path} is not run here. Read it, then add {TRUST}."
        for whose, model in models.items()
        if model.trust_remote_code
    ]
    notes += [f"{name} {x!r} is not imported here. Read it, then add {TRUST}." for name, x in own.items()]
    changes = {
        "student": replace(run.student, trust_remote_code=False),
        "teacher": replace(run.teacher, trust_remote_code=False),
        "teachers": {name: replace(x, trust_remote_code=False) for name, x in run.teachers.items()},
        "readers": {name: replace(x, trust_remote_code=False) for name, x in run.readers.items()},
        "rollout": replace(run.rollout, engine=None),
        "probes": tuple(probe for probe in run.probes if probe.name not in own.values()),
        "grader": None if "grader" in own else run.grader,
        "evaluation": replace(run.evaluation, grader=None) if "evaluation.grader" in own else run.evaluation,
    }
    return replace(run, **changes), notes


def with_its_code(run: Run, trusted: bool, *, writes: bool = False) -> tuple[Run, list[str]]:
    """The same for commands that can say nothing of a run without its method and its teachers, nor, where the command
    `writes` rollouts, without its engine."""
    if run.given:
        raise ConfigError(
            f"the run was given its {' and '.join(run.given)} in Python, which no file holds, so it cannot be "
            "examined here. `tropd report`, `watch` and `inspect` read what it left."
        )
    seen, notes = without_code(run, trusted)
    needed = r"method\.name|rollout\.policy|(teachers?|readers)\.([^ ]+\.)?(path|briefing)"
    needed += r"|rollout\.engine" * writes
    if any(x.briefing.needs for x in (*run.all_teachers.values(), *run.all_readers.values())):
        needed += "|grader "  # its words and rewards are told
    if lacking := [note for note in notes if re.match(needed, note)]:
        raise ConfigError(" ".join(lacking))
    return seen, notes


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
