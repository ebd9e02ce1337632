"""What a run is: frozen dataclasses, one default each, read from TOML and from flags, written back complete.

load(path, flags) -> Run     unknown keys and wrong types are refused with their path and a suggestion
dump(run) -> str             the whole run as TOML, defaults included
fingerprint(run) -> str      names it
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import tomllib
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from tropd.data.prompts import DataConfig
from tropd.errors import ConfigError
from tropd.evaluation.results import EvalConfig
from tropd.methods import METHODS, AnyMethod, TrOPD
from tropd.probes.alarms import AlarmConfig
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Train an adapter instead of the weights."""

    rank: int = 32
    alpha: float = 64.0
    dropout: float = 0.0
    """Above 0 the student that samples differs from the student that is trained."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names, or "all-linear"."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"student.lora.rank is {self.rank}; give at least 1.")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A causal language model in the Hugging Face layout."""

    path: str
    """A folder or a hub id."""
    gguf_file: str | None = None
    """Read the weights from this GGUF file in the folder."""
    tokenizer: str | None = None
    """Where the tokenizer is, if not with the model."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: float32 on CPU, bfloat16 elsewhere."""
    trust_remote_code: bool = False
    """Run code that comes with the model.  Off unless you have read it."""


@dataclass(frozen=True, kw_only=True)
class StudentConfig(ModelConfig):
    lora: LoraConfig | None = None
    gradient_checkpointing: bool = False


@dataclass(frozen=True, kw_only=True)
class TeacherConfig(ModelConfig):
    path: str = "base"
    """A folder, a hub id, or "base": the student without its adapter (LoRA only)."""
    text_cache: bool = True
    """Keep the texts it writes on disk, in the run's folder."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    num_prompts: int = 16
    """Prompts per step."""
    num_rollouts: int = 4
    """Responses per prompt (TrOPD: 4)."""
    max_new_tokens: int = 512
    sampling: Sampling | None = None
    """By default what the method prescribes, or the student itself."""
    teacher_sampling: Sampling = field(default_factory=Sampling)
    """How the teacher's texts are drawn."""
    max_batch: int = 64
    """Rollouts that are written at the same time."""
    save_every: int = 10
    """Keep the rollouts of every n-th step as parquet; 0 keeps none."""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "num_rollouts", "max_new_tokens", "max_batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}; give at least 1.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW."""

    learning_rate: float = 5e-6
    """(TrOPD: 5e-6, fixed)"""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    max_gradient_norm: float = 1.0
    """Longer gradients are scaled down to it; the norm before that is recorded."""
    num_updates: int = 1
    """Optimiser steps per batch of rollouts; above 1 importance ratios correct for the drift."""

    def __post_init__(self) -> None:
        if self.num_updates < 1:
            raise ConfigError(f"optimizer.num_updates is {self.num_updates}; give at least 1.")
        if not self.learning_rate > 0:
            raise ConfigError(f"optimizer.learning_rate is {self.learning_rate}; give a positive number.")


@dataclass(frozen=True, kw_only=True)
class RunEvalConfig(EvalConfig):
    data: DataConfig | None = None
    """Held-out prompts; without it nothing is evaluated."""
    every: int = 50
    """Evaluate after every n-th step, and at the end."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every: int = 50
    """Save after every n-th step, and at the end."""
    keep: int = 2
    """The newest ones that stay on disk; the best by evaluation stays as well."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise ConfigError(f"checkpoint.every is {self.every} and checkpoint.keep {self.keep}; give at least 1.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that a run is made of."""

    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    method: Annotated[AnyMethod, Field(discriminator="name")] = field(default_factory=TrOPD)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: RunEvalConfig = field(default_factory=RunEvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    grader: str | None = None
    """Judges training rollouts: exact, numeric, multiple_choice, math, or "package.module:function"."""
    steps: int = 200
    """(TrOPD: 200)"""
    seed: int = 0
    output: str = "runs/tropd"
    """The run's folder."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    tokens_per_micro_batch: int = 8192
    """Prompt and response tokens in one forward and backward pass; changes memory and speed, never the result."""
    tile_tokens: int = 512
    """Tokens whose logits exist at the same time."""
    trackers: tuple[Literal["trackio", "wandb", "tensorboard"], ...] = ()

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps is {self.steps}; give at least 1.")
        if self.optimizer.num_updates > self.rollout.num_prompts * self.rollout.num_rollouts:
            raise ConfigError(
                f"optimizer.num_updates = {self.optimizer.num_updates} shares of "
                f"{self.rollout.num_prompts * self.rollout.num_rollouts} rollouts would leave some without any."
            )
        if self.teacher.path == "base" and self.student.lora is None:
            raise ConfigError(
                'teacher.path is "base", the student without its adapter, but the student has no adapter: it would '
                "be its own teacher and learn nothing. Set teacher.path, or a [student.lora] section."
            )

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn: asked for, else prescribed by the method, else from the student itself."""
        return self.rollout.sampling or self.method.sampling or Sampling()


def parts(cls: Any) -> Iterator[Any]:
    """A dataclass and all dataclasses in its fields."""
    yield cls
    for hint in get_type_hints(cls).values():
        for choice in _flat(hint):
            if dataclasses.is_dataclass(choice):
                yield from parts(choice)


def _flat(hint: Any) -> Iterator[Any]:
    """The classes inside a hint such as `tuple[A, ...] | None`."""
    if isinstance(hint, type):
        yield hint
    for inner in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _flat(inner)


@cache
def _adapter() -> TypeAdapter[Run]:
    for cls in set(parts(Run)):
        cls.__pydantic_config__ = {"extra": "forbid"}
    return TypeAdapter(Run)


def build(values: dict[str, Any], source: str) -> Run:
    """A run from nested values, such as parsed TOML.  `source` names it in errors."""
    method = values.get("method")
    if isinstance(method, str):
        values = {**values, "method": {"name": method}}
    elif isinstance(method, dict) and "name" not in method:
        values = {**values, "method": {"name": "tropd", **method}}
    try:
        return _adapter().validate_json(json.dumps(values, default=str), strict=True)
    except ValidationError as error:
        lines = [_explain(e) for e in error.errors()]
        raise ConfigError(f"{source}: " + "\n  ".join(lines)) from None


def load(path: Path, flags: Sequence[str] = ()) -> Run:
    """A run from a TOML file, changed by flags such as `--method.top-k 32`."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        near = sorted(p.name for p in path.parent.glob("*.toml")) if path.parent.is_dir() else []
        there = f" TOML files there: {', '.join(near)}." if near else ""
        raise ConfigError(f"there is no file {path}.{there}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from None
    run = build(values, str(path))
    if not flags:
        return run
    try:
        return tyro.cli(tyro.conf.AvoidSubcommands[Run], default=run, args=list(flags), prog="tropd train RUN.toml")
    except SystemExit as stop:
        if stop.code:
            raise ConfigError("the flags above are not understood. See `tropd train RUN.toml --help`.") from None
        raise


def _explain(error: Any) -> str:
    path = [str(x) for x in error["loc"] if not (len(error["loc"]) > 1 and x in METHODS)]
    where, last = ".".join(path), path[-1] if path else ""
    if error["type"] == "unexpected_keyword_argument":
        known = _fields_at(error["loc"][:-1])
        near = difflib.get_close_matches(last, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}."
        return f"unknown key {where!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        name = str(error["input"].get("name"))
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.4)
        hint = f" did you mean {near[0]!r}?" if near else ""
        return f"there is no method {name!r};{hint} known: {', '.join(METHODS)}."
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where!r} is missing."
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{where!r}: {message} (given: {error['input']!r})" if error["type"] != "value_error" else message


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    """Field names of the dataclass at a path of an error."""
    cls: Any = Run
    for step in loc:
        if step in METHODS:
            cls = METHODS[step]
            continue
        hint = get_type_hints(cls).get(str(step))
        found = [c for c in _flat(hint) if dataclasses.is_dataclass(c)]
        if step == "method" and cls is Run:
            continue
        if not found:
            return []
        cls = found[0]
    return [f.name for f in dataclasses.fields(cls)]


def to_dict(value: Any) -> Any:
    """Plain values, without what is None: TOML has no null, and None is always the default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: to_dict(x) for name, x in pairs if x is not None}
    if isinstance(value, dict | types.MappingProxyType):
        return {k: to_dict(x) for k, x in value.items() if x is not None}
    return [to_dict(x) for x in value] if isinstance(value, list | tuple) else value


def dump(run: Run) -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(run))


def fingerprint(run: Run) -> str:
    """Twelve characters that differ when anything that shapes the result does."""
    values = to_dict(run)
    for name in ("output", "trackers"):
        values.pop(name, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]
