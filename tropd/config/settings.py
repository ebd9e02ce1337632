"""What a run is made of: frozen dataclasses with one default each, and what they may not say together."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import quote

from tyro.conf import Fixed, Suppress

from tropd.base.names import shown
from tropd.base.ranges import Count, Ranged, Whole
from tropd.base.reading import check_path, printable
from tropd.briefings.briefing import AsStudent
from tropd.config.alarms import AlarmConfig
from tropd.config.methods import MethodTable, as_table, named, read_method
from tropd.config.models import GIVEN, ModelConfig, StudentConfig, TeacherConfig, base_url
from tropd.config.stages import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunEvalConfig,
)
from tropd.errors import ConfigError
from tropd.methods import Method, TrOPD
from tropd.types import Sampling

Part = Literal["student", "teacher", "method", "grader", "prompts", "held_out"]


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Everything that a run is made of."""

    section = ""

    student: StudentConfig = field(default_factory=StudentConfig)
    data: DataConfig = field(default_factory=DataConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Instead of `teacher`, several by name; `data.teacher_column` says which of them a prompt is for."""
    method: MethodTable = field(default_factory=TrOPD)
    """Of tropd by its name, such as "opd", or your own as "package.module:Class" or "file.py:Class"; with its knobs."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: RunEvalConfig = field(default_factory=RunEvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grader: str | None = None
    """Judges training rollouts: exact, numeric, multiple_choice, math, chain, gym, or your own as "package.module:name"
    or "file.py:name"."""
    steps: Count = 200
    """(TrOPD: 200) At least 1."""
    seed: Whole = 0
    """Of all that is drawn. At least 0."""
    given: Annotated[tuple[Part, ...], Fixed, Suppress] = ()
    """What was given in Python and no file can hold: it has to be given again to go on."""
    output: str = "runs/tropd"
    """The run's folder."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    tokens_per_micro_batch: Count = 8192
    """Prompt and response tokens in one forward and backward pass; changes memory and speed, never the result. At least
    1."""
    tile_tokens: Count = 512
    """Tokens whose logits exist at the same time. At least 1."""
    tile_vocab: Count | None = None
    """Also tile the vocabulary, so many tokens of it at a time: less memory, one more matrix product. At least 1."""
    trackers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        for name in ("student", "data", "teacher"):
            object.__setattr__(self, name, _section(_SECTIONS[name], getattr(self, name)))
        if isinstance(self.teachers, dict):
            of = {name: _section(TeacherConfig, teacher) for name, teacher in self.teachers.items()}
            object.__setattr__(self, "teachers", of)
        object.__setattr__(self, "output", str(self.output) if isinstance(self.output, Path) else self.output)
        _check_kinds(self)
        method = read_method(as_table(self.method), "method") if isinstance(self.method, str) else named(self.method)
        object.__setattr__(self, "method", method)
        super().__post_init__()
        _check(self)

    def check_complete(self) -> None:
        """Refuse a run that lacks a part and was not given it in Python."""
        held_out = self.evaluation.data
        named = {"student": self.student.path, "prompts": self.data.path, "held_out": held_out and held_out.path}
        keys = {"student": "student.path", "prompts": "data.path", "held_out": "evaluation.data.path"}
        if missing := [keys[part] for part, path in named.items() if path == GIVEN and part not in self.given]:
            raise ConfigError(f"{' and '.join(map(repr, missing))} is missing.")
        for name, teacher in self.all_teachers.items():
            if teacher.path == "base" and self.student.lora is None and "teacher" not in self.given:
                whose = f"teacher {name!r}: " if self.teachers else ""
                raise ConfigError(
                    f'{whose}teacher.path is "base", the student without its adapter, but the student has no adapter: '
                    "it would be its own teacher and learn nothing. Set teacher.path, or a [student.lora] section."
                )

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the names that prompts have for them."""
        return {name: self._read_from(x) for name, x in (self.teachers or {"default": self.teacher}).items()}

    def _read_from(self, teacher: TeacherConfig) -> TeacherConfig:
        """The teacher as it is loaded: the student before training is its base, or its files once more."""
        if teacher.path != "start":
            return teacher
        if self.student.lora is not None:
            return replace(teacher, path="base")
        names = ("path", "gguf_file", "tokenizer", "revision", "trust_remote_code")
        return replace(teacher, **{name: getattr(self.student, name) for name in names})

    @property
    def teachers_said(self) -> str:
        """Who teaches, for people to read."""
        return ", ".join(f"{name}: {shown(x.path)}" for name, x in self.teachers.items()) or shown(self.teacher.path)

    def taught_by(self, name: str) -> Self:
        """The run as it would be with one of its teachers alone."""
        if not self.teachers:
            return self
        data = replace(self.data, teacher_column=None)
        return replace(self, teacher=self.teachers[name], teachers={}, data=data)

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn: asked for, else prescribed by the method, else from the student itself."""
        return self.rollout.sampling or self.method.sampling or Sampling()


_SECTIONS: dict[str, type] = {
    "student": StudentConfig,
    "data": DataConfig,
    "teacher": TeacherConfig,
    "teachers": dict,
    "rollout": RolloutConfig,
    "optimizer": OptimizerConfig,
    "evaluation": RunEvalConfig,
    "checkpoint": CheckpointConfig,
    "alarms": AlarmConfig,
    "parallel": ParallelConfig,
    "output": str,
}
_OBJECTS = {"student": "student", "teacher": "teacher", "data": "prompts", "grader": "grader"}
"""What `train` takes as objects, by the names of the sections."""


def _section(cls: type, value: Any) -> Any:
    """A path stands for its section."""
    return cls(path=str(value)) if isinstance(value, str | Path) else value


def _check_kinds(run: Settings) -> None:
    """In Python anything can be given for a section."""
    asked = {name: (getattr(run, name), cls) for name, cls in _SECTIONS.items()}
    if isinstance(run.teachers, dict):
        asked |= {f"teachers.{name}": (teacher, TeacherConfig) for name, teacher in run.teachers.items()}
    asked |= {"method": (run.method, Method | str), "grader": (run.grader, str | None)}
    for name, (value, kind) in asked.items():
        if not isinstance(value, kind):
            said = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            part = _OBJECTS.get(name)
            instead = f" Objects are for train(run, {part}=...)." if part else ""
            right = getattr(kind, "__name__", "name") if name != "method" else "method, such as OPD(), or its name"
            raise ConfigError(f"{name} is {said}. Give a {right}.{instead}")


def _check(run: Settings) -> None:
    updates = run.steps * run.optimizer.num_updates
    if run.optimizer.warmup_steps > updates:
        raise ConfigError(
            f"optimizer.warmup_steps = {run.optimizer.warmup_steps} was asked for, but the run has {updates} updates: "
            "its learning rate would never be reached. Give at most as many."
        )
    for asked in (run.rollout, run.teacher, *run.teachers.values()):
        variable = asked.server.api_key_env
        if variable is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):
            raise ConfigError(f"api_key_env is {printable(variable)!r}, but no variable is called that. Give its name.")
    for url in (u for asked in (run.rollout, run.teacher, *run.teachers.values()) for u in asked.servers):
        base_url(url)
    for name, path in _paths(run).items():
        if path is not None and not path.strip():
            raise ConfigError(f"{name} is empty. Name a file or a folder.")
        check_path(path or "", name)
    if run.optimizer.num_updates > run.rollout.num_prompts * run.rollout.num_rollouts:
        raise ConfigError(
            f"optimizer.num_updates = {run.optimizer.num_updates} shares of "
            f"{run.rollout.num_prompts * run.rollout.num_rollouts} rollouts would leave some without any."
        )
    if run.parallel.student == "sharded" and run.student.lora is not None:
        raise ConfigError(
            'parallel.student is "sharded", but the student has an adapter, which is small: only whole students '
            'are sharded. Set parallel.student = "replicated".'
        )
    if run.teachers or run.data.teacher_column is not None:
        _check_teachers(run)
    else:
        _check_teacher(run)


def _paths(run: Settings) -> dict[str, str | None]:
    """Everything in a run that is the name of a file."""
    found = {"output": run.output, "rollout.weights_folder": run.rollout.weights_folder}
    models: dict[str, ModelConfig] = {"student": run.student, "teacher": run.teacher}
    for whose, model in (models | {f"teachers.{name}": model for name, model in run.teachers.items()}).items():
        found |= {f"{whose}.{name}": getattr(model, name) for name in ("path", "tokenizer", "gguf_file")}
    held_out = run.evaluation.data
    return found | {"data.path": run.data.path, "evaluation.data.path": held_out.path if held_out else None}


def _check_teacher(run: Settings) -> None:
    teacher = run.teacher
    if teacher.path in ("base", "start", "student") and teacher.servers:
        raise ConfigError(
            "teacher.servers names servers, but teacher.path does not say what they serve. Set it to the folder or "
            "hub id of that model: its tokenizer is compared, its weights are not read."
        )
    if not isinstance(teacher.briefing, AsStudent) and teacher.server.text == "chat":
        raise ConfigError(
            'teacher.server.text is "chat", whose messages are the student\'s, but the teacher is told more. Set '
            'teacher.server.text = "tokens", or leave the briefing out.'
        )
    if teacher.path == "student" and run.optimizer.num_updates > 1:
        raise ConfigError(
            f'teacher.path is "student", which changes with every update, but optimizer.num_updates is '
            f"{run.optimizer.num_updates}: what it said of a batch would be another's. Set it to 1, or teacher.path to "
            '"start".'
        )
    if teacher.is_own and teacher.servers:
        raise ConfigError(
            f"teacher.servers names servers, but teacher.path is {teacher.path}, a teacher of your own: they would "
            "never be asked. Leave teacher.servers out."
        )
    if teacher.knobs and not teacher.is_own:
        raise ConfigError(
            f"teacher.knobs has {', '.join(teacher.knobs)}, but teacher.path is {teacher.path}, which takes no knobs. "
            "They are for a teacher of your own, 'package.module:Class' or 'file.py:Class'."
        )
    if teacher.score_cache and not teacher.servers:
        raise ConfigError("teacher.score_cache keeps what servers say, but teacher.servers is empty. Leave it out.")
    if run.parallel.teacher == "sharded" and run.all_teachers["default"].is_student:
        raise ConfigError(
            f'parallel.teacher is "sharded", but teacher.path is "{teacher.path}": that teacher is the student, which '
            'every process holds. Set parallel.teacher = "replicated".'
        )
    if run.parallel.teacher == "sharded" and teacher.servers:
        raise ConfigError(
            'parallel.teacher is "sharded", but teacher.servers hold the teacher: no process here has a part of '
            "it. Leave parallel.teacher out."
        )


def _check_teachers(run: Settings) -> None:
    column = run.data.teacher_column
    if column is None:
        raise ConfigError(
            f"there are the teachers {', '.join(run.teachers)}, but nothing says which of them a prompt is for. "
            "Set data.teacher_column to the column that names it."
        )
    if not run.teachers:
        raise ConfigError(
            f"data.teacher_column is {column!r}, which asks for several teachers, but there is only [teacher]. "
            "Give each a section [teachers.NAME] with the name that the column has, or leave the column out."
        )
    for name in run.teachers:
        _check_name(name, column)
    if run.teacher != type(run.teacher)():
        raise ConfigError(
            f"there are the teachers {', '.join(run.teachers)}, and [teacher] beside them, which no prompt would "
            "reach. Move it to a section [teachers.NAME]."
        )
    if run.parallel.teacher == "sharded":
        raise ConfigError(
            'parallel.teacher is "sharded", but there are several teachers, which are asked different numbers of '
            'times by each process. Set parallel.teacher = "replicated", or serve them.'
        )
    for name in run.teachers:
        try:
            run.taught_by(name)
        except ConfigError as refusal:
            raise ConfigError(f"teacher {name!r}: {refusal}") from None


def _check_name(name: str, column: str) -> None:
    """It is written into records and, with the letters that files cannot have as %XX, into the names of files."""
    if not name.strip():
        raise ConfigError(
            f'there is a section [teachers."{name}"], whose name is empty. Give the teacher one that can be read, here '
            f"and in the column {column!r}."
        )
    in_files = len(quote(name, safe=""))
    if len(name) > 100 or in_files > 200:
        raise ConfigError(
            f"the teacher's name {name[:24]!r}... has {len(name)} characters, {in_files} in the names of files. Give "
            f"it at most 100, and 200 there, here and in the column {column!r}."
        )
