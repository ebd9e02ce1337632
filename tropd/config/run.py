"""What a run is: frozen dataclasses with one default each, read from TOML and flags and written as TOML.

run = Run(student="folder", teacher="folder", data="prompts.jsonl", method=TrOPD(top_k=16), steps=10)
run = Run.load("run.toml", ["--steps", "10"])
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import AvoidSubcommands

from tropd.base.names import Own, located
from tropd.base.reading import check_path, read_toml
from tropd.briefings.briefing import OwnBriefing
from tropd.config.alarms import AlarmConfig
from tropd.config.checks import check
from tropd.config.flags import method_flag, read_flags, take, with_knobs, with_named
from tropd.config.methods import imported, located_method, read_method
from tropd.config.models import ReaderConfig, StudentConfig, TeacherConfig
from tropd.config.policies import imported_policy
from tropd.config.settings import AnyTeacher, Part, Settings
from tropd.config.stages import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunEvalConfig,
)
from tropd.config.tables import read, to_dict, with_sections
from tropd.errors import ConfigError
from tropd.methods import Method, NamedMethod


@dataclass(frozen=True, kw_only=True)
class Run(Settings):
    """Everything that a run is made of."""

    if TYPE_CHECKING:  # a text stands for a section's path, or for a method's name

        def __init__(
            self,
            *,
            student: StudentConfig | str | Path = ...,
            data: DataConfig | str | Path = ...,
            teacher: TeacherConfig | str | Path = ...,
            teachers: Mapping[str, TeacherConfig | str | Path] = ...,
            readers: Mapping[str, ReaderConfig | str | Path] = ...,
            method: Method | str = ...,
            rollout: RolloutConfig = ...,
            optimizer: OptimizerConfig = ...,
            evaluation: RunEvalConfig = ...,
            checkpoint: CheckpointConfig = ...,
            alarms: AlarmConfig = ...,
            parallel: ParallelConfig = ...,
            probes: Sequence[Own | str | Mapping[str, Any]] = ...,
            grader: str | None = ...,
            steps: int = ...,
            seed: int = ...,
            given: tuple[Part, ...] = ...,
            output: str = ...,
            device: Literal["auto", "cpu", "cuda", "mps"] = ...,
            tokens_per_micro_batch: int = ...,
            tile_tokens: int = ...,
            tile_vocab: int | None = ...,
            trackers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ...,
        ) -> None: ...

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self)

    @classmethod
    def load(cls, path: Path | str, flags: Sequence[str] = ()) -> Run:
        """A run from a TOML file, changed by flags such as `--method.top-k 32`.  Code that it names is not imported."""
        path = Path(path)
        check_path(path, "the run file")
        if not os.path.lexists(path):
            near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
            there = f" TOML files there: {', '.join(near)}." if near else ""
            raise ConfigError(f"there is no file {path}.{there}")
        if (path / "run.toml").is_file():
            raise ConfigError(f"{path} is the folder of a run. Give its file: {path / 'run.toml'}.")
        name, flags = method_flag(flags)
        values, flags = with_named(read_toml(path), flags)
        values = with_sections(cls, values, flags)
        # Several teachers and the column that chooses among them make sense only together.
        column, flags = take(flags, r"data\.teacher[-_]column")
        for value in column.values():
            values["data"] = {**values.get("data", {}), "teacher_column": value}
        run = cls._read(values, str(path), path.parent)
        if name not in (None, run.method.name):
            run = cls._read({**values, "method": {"name": name}}, f"--method {name}", path.parent)
        return run._changed(flags) if flags else run._complete(str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the run", folder: Path | None = None) -> Run:
        """A run from nested values, such as parsed TOML.  `source` names them in errors; files with code of your own
        are looked for in `folder`, then in the current one."""
        return cls._read(values, source, folder)._complete(source)

    @classmethod
    def _read(cls, values: Mapping[str, Any], source: str, folder: Path | None) -> Run:
        run = read(cls, values, source)
        return replace(run, method=read_method(run.method, source)).located([folder] if folder else [])

    def _complete(self, source: str) -> Run:
        try:
            self.check_complete()
        except ConfigError as refusal:
            raise ConfigError(f"{source}: {refusal}") from None
        return self

    def _changed(self, flags: Sequence[str]) -> Run:
        """The run as flags change it."""
        method = self.method
        if isinstance(method, NamedMethod):
            asked, flags = take(flags, r"method\..+")
            method = replace(method, knobs=with_knobs(method.knobs, asked, "method"))
        asked_of: dict[str, Mapping[str, Any]] = {}
        several = [f"{section}.{name}" for section in ("teachers", "readers") for name in getattr(self, section)]
        for whose in ("teacher", *several):
            asked_of[whose], flags = take(flags, rf"{re.escape(whose)}\.knobs\..+")
        run: Run = read_flags(AvoidSubcommands[Run], flags, "tropd train RUN.toml", default=self)

        def knobbed(teacher: AnyTeacher, whose: str) -> AnyTeacher:  # which flags may have made another one
            return replace(teacher, knobs=with_knobs(teacher.knobs, asked_of[whose], f"{whose}.knobs"))

        teachers = {name: knobbed(teacher, f"teachers.{name}") for name, teacher in run.teachers.items()}
        readers = {name: knobbed(reader, f"readers.{name}") for name, reader in run.readers.items()}
        run = replace(run, teacher=knobbed(run.teacher, "teacher"), teachers=teachers, readers=readers)
        run = replace(run, method=method) if isinstance(method, NamedMethod) else run
        run.check_complete()
        return run.located()

    def dump(self) -> str:
        """The whole run as TOML, defaults included."""
        import tomli_w

        return tomli_w.dumps(to_dict(self))

    def fingerprint(self) -> str:
        """Twelve characters that differ when anything that shapes the result does: not where servers are, how long they
        are waited for, what is kept and what is watched."""
        values = to_dict(self)
        for name in ("output", "trackers", "parallel", "checkpoint", "alarms", "probes"):
            values.pop(name, None)
        for name in ("weights_folder", "servers_sleep"):
            values["rollout"].pop(name, None)
        several = (*values["teachers"].values(), *values["readers"].values())
        for served in (values["rollout"], values["teacher"], *several):
            served["servers"] = bool(served["servers"])
            if chat := served.get("chat"):
                served["chat"] = {name: x for name, x in chat.items() if not name.startswith("max_")}
            served["server"] = {name: served["server"].get(name) for name in ("kind", "model", "text")}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]

    def located(self, folders: Sequence[Path] = ()) -> Run:
        """The run with files of code of your own by their whole paths, so that they are found from anywhere."""

        def find(name: str | None) -> str | None:
            return None if name is None else located(name, folders)

        return replace(
            self,
            method=located_method(self.method, folders),
            rollout=_with_parts(self.rollout, folders),
            probes=tuple(probe.located(folders) for probe in self.probes),
            grader=find(self.grader),
            evaluation=replace(self.evaluation, grader=find(self.evaluation.grader)),
            teacher=_located(self.teacher, folders),
            teachers={name: _located(x, folders) for name, x in self.teachers.items()},
            readers={name: _located(x, folders) for name, x in self.readers.items()},
        )

    def imported(self) -> Run:
        """The run with its method and its policy, where these are code of your own: this runs that code."""
        run = self.located()
        plus = tuple(map(imported_policy, run.rollout.plus))
        rollout = replace(run.rollout, policy=imported_policy(run.rollout.policy), plus=plus)
        return replace(run, method=imported(run.method), rollout=rollout)


def _with_parts(rollout: RolloutConfig, folders: Sequence[Path]) -> RolloutConfig:
    parts = {"engine": rollout.engine, "policy": rollout.policy}
    plus = tuple(part.located(folders) for part in rollout.plus)
    return replace(rollout, plus=plus, **{name: part and part.located(folders) for name, part in parts.items()})


def _located(teacher: AnyTeacher, folders: Sequence[Path]) -> AnyTeacher:
    briefing = teacher.briefing
    if isinstance(briefing, OwnBriefing):
        briefing = replace(briefing, kind=located(briefing.kind, folders))
    return replace(teacher, path=located(teacher.path, folders), briefing=briefing)
