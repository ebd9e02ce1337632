"""What a run is made of: frozen dataclasses with one default each, and what they may not say together."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import PlainValidator
from tyro.conf import Fixed, Suppress

from tropd.base.names import Own, shown
from tropd.base.ranges import Count, Ranged, Whole
from tropd.briefings.reader import Reader
from tropd.config.alarms import AlarmConfig
from tropd.config.methods import MethodTable, as_table, named, read_method
from tropd.config.models import GIVEN, ReaderConfig, StudentConfig, TeacherConfig
from tropd.config.policies import writes_alone
from tropd.config.probes import PROBES, read_probes
from tropd.config.stages import (
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunEvalConfig,
)
from tropd.errors import ConfigError
from tropd.methods import Method, NamedMethod, TrOPD
from tropd.methods.policies import RolloutPolicy
from tropd.methods.stacked import POLICIES, stacked
from tropd.types import READER, Sampling

AnyTeacher = TypeVar("AnyTeacher", bound=TeacherConfig)
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
    readers: dict[str, ReaderConfig] = field(default_factory=dict)
    """Others who read every response, by the names that the method's pieces use."""
    method: MethodTable = field(default_factory=TrOPD)
    """Of tropd by its name, such as "opd", or your own as "package.module:Class" or "file.py:Class"; with its knobs."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: RunEvalConfig = field(default_factory=RunEvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    probes: Annotated[tuple[Own, ...], PlainValidator(read_probes), Fixed, Suppress] = ()
    """What else is watched: geometry, or your own as "package.module:Class" or "file.py:Class"; with its knobs, and
    `every` for every n-th step."""
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
        for name, cls in (("teachers", TeacherConfig), ("readers", ReaderConfig)):
            if isinstance(several := getattr(self, name), dict):
                object.__setattr__(self, name, {of: _section(cls, value) for of, value in several.items()})
        object.__setattr__(self, "output", str(self.output) if isinstance(self.output, Path) else self.output)
        object.__setattr__(self, "probes", read_probes(self.probes))
        _check_kinds(self)
        method = read_method(as_table(self.method), "method") if isinstance(self.method, str) else named(self.method)
        object.__setattr__(self, "method", method)
        super().__post_init__()

    def check_complete(self) -> None:
        """Refuse a run that lacks a part and was not given it in Python."""
        held_out = self.evaluation.data
        named = {"student": self.student.path, "prompts": self.data.path, "held_out": held_out and held_out.path}
        keys = {"student": "student.path", "prompts": "data.path", "held_out": "evaluation.data.path"}
        if missing := [keys[part] for part, path in named.items() if path == GIVEN and part not in self.given]:
            raise ConfigError(f"{' and '.join(map(repr, missing))} is missing.")
        graded = self.grader is not None or "grader" in self.given
        for name, teacher in self.all_teachers.items():
            if problem := teacher.lacks(self.student, graded) if "teacher" not in self.given else "":
                raise ConfigError(f"teacher {name!r}: {problem}" if self.teachers else problem)
        for name, reader in self.all_readers.items():
            if problem := reader.lacks(self.student, graded):
                raise ConfigError(f"reader {name!r}: {problem}")
        _check_jointly(self)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the names that prompts have for them."""
        return {name: self._read_from(x) for name, x in self.said_teachers.items()}

    @property
    def said_teachers(self) -> dict[str, TeacherConfig]:
        """The same as they are set or prescribed, before "start" becomes files."""
        return self.teachers or {"default": self._only_teacher}

    @property
    def _only_teacher(self) -> TeacherConfig:
        """The one that is set, or else the one that the method prescribes."""
        prescribed = self.method.readers.get(READER)
        if prescribed is None or self.teacher != TeacherConfig() or "teacher" in self.given:
            return self.teacher
        return TeacherConfig(**_shared(prescribed))

    @property
    def all_readers(self) -> dict[str, ReaderConfig]:
        """Those beside "teacher": as they are set, or else as the method prescribes.  One whose path is "teacher" has
        the teacher's model and tokenizer, and only its own briefing."""
        readers = {name: self._read_from(x) for name, x in self.said_readers.items()}
        if self.teachers or (bridge := self._only_teacher.bridge) is None:
            return readers
        own = {name for name, x in readers.items() if x.path != READER or x.mean or x.steered}
        return {name: x if name in own else replace(x, bridge=bridge) for name, x in readers.items()}

    @property
    def said_readers(self) -> dict[str, ReaderConfig]:
        """The same before "start" becomes files."""
        prescribed = {
            name: ReaderConfig(**_shared(reader), mean=reader.mean, steered=reader.steered)
            for name, reader in self.method.readers.items()
            if name != READER
        }
        return {**prescribed, **self.readers}

    def _read_from(self, teacher: AnyTeacher) -> AnyTeacher:
        """The teacher as it is loaded: the student before training is its base, or its files once more."""
        if teacher.path != "start":
            return teacher
        if self.student.lora is not None:
            return replace(teacher, path="base")
        names = ("path", "gguf_file", "tokenizer", "revision", "trust_remote_code")
        names += ("dtype",) if teacher.follows else ()
        return replace(teacher, **{name: getattr(self.student, name) for name in names})

    @property
    def teachers_said(self) -> str:
        """Who teaches, for people to read."""
        known = not isinstance(self.method, NamedMethod) and self.rollout.policy is None
        if known and not (self.method.objective.readers or self.method.rollout.needs_teacher_text):
            return "nobody"
        each = ", ".join(f"{name}: {shown(x.title)}" for name, x in self.teachers.items())
        return each or shown(self._only_teacher.title)

    @property
    def readers_said(self) -> str:
        """Who reads beside the teacher, for people to read; empty if nobody does."""
        said = {name: shown(x.path) if x.made_of is None else str(x.made_of) for name, x in self.said_readers.items()}
        return "; ".join(f"{name}: {whose}" for name, whose in said.items())

    def taught_by(self, name: str) -> Self:
        """The run as it would be with one of its teachers alone."""
        if not self.teachers:
            return self
        data = replace(self.data, teacher_column=None)
        return replace(self, teacher=self.teachers[name], teachers={}, data=data)

    def read_by(self, name: str) -> Self:
        """The run as it would be with one of its readers as its only teacher."""
        values = {f.name: getattr(self.said_readers[name], f.name) for f in fields(TeacherConfig)}
        data = replace(self.data, teacher_column=None)
        return replace(self, teacher=TeacherConfig(**values), teachers={}, readers={}, data=data)

    @property
    def own_parts(self) -> dict[str, str]:
        """Names of code of the user's own that writes or watches, by their keys."""
        found = self.rollout.named | {f"probes.{shown(probe.name)}": probe for probe in self.probes}
        return {key: part.name for key, part in found.items() if part.name not in (*POLICIES, *PROBES)}

    @property
    def policy(self) -> RolloutPolicy:
        """Who writes which token: asked for, else prescribed by the method; and what is asked for beside it."""
        policy = self.method.rollout if self.rollout.policy is None else self.rollout.policy.policy
        return stacked([policy, *(more.policy for more in self.rollout.plus)])

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn: asked for, else prescribed by the method, else from the student itself."""
        return self.rollout.sampling or self.method.sampling or Sampling()


def _check_jointly(run: Settings) -> None:
    """Refuse a policy that draws tokens from both models where one of them is not a model of this process; a policy or
    a method of the user's own once it is imported."""
    wanted = run.rollout
    of_method = None if isinstance(run.method, NamedMethod) else run.method.rollout
    policies = (of_method if wanted.policy is None else wanted.policy.made, *(more.made for more in wanted.plus))
    joint = next((policy for policy in policies if policy is not None and policy.writes_jointly), None)
    if joint is None:
        return
    problems = {"rollout.servers write as the student": wanted.servers, "a rollout.engine does": wanted.engine}
    for name, teacher in run.all_teachers.items() if "teacher" not in run.given else ():
        said = f"teacher {name!r}" if run.teachers else "the teacher"
        problems |= {
            f"{said} is on servers": teacher.servers,
            f"{said} is one of your own": teacher.is_own,
            f"{said} has a bridge to another tokenizer": teacher.bridge,
            f"{said} has a direction, with which it reads and cannot write": teacher.direction,
        }
    if problem := next((said for said, found in problems.items() if found), ""):
        raise ConfigError(writes_alone(joint, problem))


def _shared(reader: Reader) -> dict[str, Any]:
    """What a method prescribes, as fields of a section."""
    return {
        "path": reader.model,
        "briefing": reader.briefing,
        "follow": reader.follow,
        "direction": reader.direction,
    }


_SECTIONS: dict[str, type] = {
    "student": StudentConfig,
    "data": DataConfig,
    "teacher": TeacherConfig,
    "teachers": dict,
    "readers": dict,
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
    for several, cls in (("teachers", TeacherConfig), ("readers", ReaderConfig)):
        if isinstance(of := getattr(run, several), dict):
            asked |= {f"{several}.{name}": (value, cls) for name, value in of.items()}
    asked |= {"method": (run.method, Method | str), "grader": (run.grader, str | None)}
    for name, (value, kind) in asked.items():
        if not isinstance(value, kind):
            said = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
            part = _OBJECTS.get(name)
            instead = f" Objects are for train(run, {part}=...)." if part else ""
            right = getattr(kind, "__name__", "name") if name != "method" else "method, such as OPD(), or its name"
            raise ConfigError(f"{name} is {said}. Give a {right}.{instead}")
