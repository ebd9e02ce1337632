"""What a run is: frozen dataclasses with one default each.  `tropd.config_file` reads and writes them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from tropd.data.prompts import DataConfig
from tropd.errors import ConfigError
from tropd.evaluation.results import EvalConfig
from tropd.methods import AnyMethod, TrOPD
from tropd.probes.alarms import AlarmConfig
from tropd.ranges import Count, LearningRate, NotNegative, Positive, Range, Ranged, Whole
from tropd.refusals import check
from tropd.servers.settings import ServerConfig
from tropd.types import Sampling

_Beta = Annotated[float, Range(at_least=0, below=1)]
MOST_ROLLOUTS = 2**20
"""Of a step.  More are a slip of the keyboard, and would be prepared for hours before the first token."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig(Ranged):
    """Train an adapter instead of the weights."""

    section = "student.lora"

    rank: Count = 32
    """Columns of the adapter's matrices. At least 1."""
    alpha: Count = 64
    """What the adapter adds is multiplied by alpha / rank. At least 1."""
    dropout: Annotated[float, Range(at_least=0, below=1)] = 0.0
    """Above 0 the student that samples differs from the student that is trained. In [0, 1)."""
    targets: tuple[str, ...] = ("all-linear",)
    """Module names, or "all-linear"."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.targets:
            raise ConfigError('student.lora.targets is empty. Name modules, or leave it out for "all-linear".')


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
    score_cache: bool = False
    """Keep what servers say on disk as well: texts that come again are not scored again."""
    servers: tuple[str, ...] = ()
    """Addresses that serve it, such as http://127.0.0.1:8000; of `path` only the tokenizer and config are read then."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How they are spoken to."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Ranged):
    section = "rollout"

    num_prompts: Count = 16
    """Prompts per step (TrOPD: 128; 16 is for a small GPU). At least 1."""
    num_rollouts: Count = 4
    """Responses per prompt (TrOPD: 4). At least 1."""
    max_new_tokens: Count = 512
    """Tokens of an answer at most (TrOPD: 8,096; 512 is for a small GPU). At least 1."""
    sampling: Sampling | None = None
    """By default what the method prescribes, or the student itself."""
    teacher_sampling: Sampling = field(default_factory=Sampling)
    """How the teacher's texts are drawn."""
    max_batch: Count = 64
    """Rollouts that are written at the same time. At least 1."""
    servers: tuple[str, ...] = ()
    """Addresses of vLLM servers that write the rollouts; without any this process does."""
    server: ServerConfig = field(default_factory=ServerConfig)
    """How they are spoken to."""
    weights_folder: str | None = None
    """Where they read the weights from, by default in the run's folder.  A folder under /dev/shm is memory.  The run
    makes a folder of its own in it, and removes that at its end."""
    servers_sleep: bool = False
    """They give their GPU memory back while this process trains, for servers that share a GPU with it."""
    sync_nats: Positive | None = None
    """By how much, on average, the log-probabilities of a known text may differ between a server and this process once
    it was given the weights.  By default 0.002, in half precision 0.1. Above 0."""
    staleness: Annotated[
        int,
        Range(
            at_least=0,
            at_most=1,
            advice="weights reach the servers between batches only, so batches further ahead would be no earlier",
        ),
    ] = 0
    """1: the servers write the next step's rollouts while this one trains, one step behind; 0: they wait for it. In
    [0, 1]."""
    save_every: Whole = 10
    """Keep the rollouts of every n-th step as parquet; 0 keeps none. At least 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_prompts * self.num_rollouts > MOST_ROLLOUTS:
            raise ConfigError(
                f"rollout.num_prompts = {self.num_prompts} times rollout.num_rollouts = {self.num_rollouts} is "
                f"{self.num_prompts * self.num_rollouts} rollouts per step; give at most {MOST_ROLLOUTS}."
            )
        if self.weights_folder is not None and not self.servers:
            raise ConfigError(
                f'rollout.weights_folder is "{self.weights_folder}", where servers would read the weights, but '
                "rollout.servers is empty. Leave it out."
            )
        if self.servers_sleep and not self.servers:
            raise ConfigError("rollout.servers_sleep is set, but rollout.servers is empty: nobody would sleep.")
        if self.servers_sleep and self.staleness:
            raise ConfigError(
                "rollout.servers_sleep has the servers sleep while this process trains, and rollout.staleness = 1 has "
                "them write at that time. Choose one: sleep where they share a GPU with the trainer, else staleness."
            )
        if self.staleness and not self.servers:
            raise ConfigError(
                "rollout.staleness = 1 has the next batch written while this one trains, but rollout.servers is empty "
                "and this process cannot do both at once. Name servers, or leave it at 0."
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Ranged):
    """AdamW."""

    section = "optimizer"

    learning_rate: LearningRate = 5e-6
    """(TrOPD: 5e-6, fixed) In (0, 1]."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Whole = 0
    """The learning rate rises to its full value over so many updates. At least 0, and no more than the run has."""
    betas: tuple[_Beta, _Beta] = (0.9, 0.95)
    """How much of the running means of the gradient and of its square stays. Each in [0, 1)."""
    epsilon: Positive = 1e-8
    """Added to the root of the second mean. Above 0."""
    weight_decay: NotNegative = 0.0
    """Each update takes this share, times the learning rate, off every weight. At least 0."""
    max_gradient_norm: Annotated[float, Range(above=0, unbounded=True)] = 1.0
    """Longer gradients are scaled down to it; the norm before that is recorded. Above 0; inf scales nothing."""
    num_updates: Count = 1
    """Optimiser steps per batch of rollouts; above 1 importance ratios correct for the drift. At least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate * self.weight_decay >= 1:
            raise ConfigError(
                f"optimizer.learning_rate = {self.learning_rate:g} times optimizer.weight_decay = "
                f"{self.weight_decay:g} is the share that an update takes off every weight; it must be below 1."
            )


@dataclass(frozen=True, kw_only=True)
class RunEvalConfig(EvalConfig):
    data: DataConfig | None = None
    """Held-out prompts; without it nothing is evaluated."""
    every: Count = 50
    """Evaluate after every n-th step, and at the end. At least 1."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Ranged):
    section = "checkpoint"

    every: Count = 50
    """Save after every n-th step, and at the end. At least 1."""
    keep: Count = 2
    """The newest ones that stay on disk; the best by evaluation stays as well. At least 1."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Ranged):
    """What several processes (torchrun) share; a single process reads none of it."""

    section = "parallel"

    student: Literal["auto", "sharded", "replicated"] = "auto"
    """sharded: each holds a part of weights and optimiser (FSDP2); replicated: all.  auto: sharded, but not LoRA."""
    teacher: Literal["replicated", "sharded"] = "replicated"
    """sharded: each holds a part of the teacher and gathers it layer by layer."""
    timeout_minutes: Annotated[float, Range(above=0, at_most=10**5)] = 30.0
    """How long a process waits for the others before the run ends. In (0, 100000]."""


@dataclass(frozen=True, kw_only=True)
class Run(Ranged):
    """Everything that a run is made of."""

    section = ""

    student: StudentConfig
    data: DataConfig
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Instead of `teacher`, several by name; `data.teacher_column` says which of them a prompt is for."""
    method: Annotated[AnyMethod, Field(discriminator="name")] = field(default_factory=TrOPD)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    evaluation: RunEvalConfig = field(default_factory=RunEvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    alarms: AlarmConfig = field(default_factory=AlarmConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    grader: str | None = None
    """Judges training rollouts: exact, numeric, multiple_choice, math, chain, gym, or "package.module:function"."""
    steps: Count = 200
    """(TrOPD: 200) At least 1."""
    seed: Whole = 0
    """Of all that is drawn. At least 0."""
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
        super().__post_init__()
        check(self)

    @property
    def all_teachers(self) -> dict[str, TeacherConfig]:
        """By the names that prompts have for them."""
        return self.teachers or {"default": self.teacher}

    @property
    def teachers_said(self) -> str:
        """Who teaches, for people to read."""
        return ", ".join(f"{name}: {one.path}" for name, one in self.teachers.items()) or self.teacher.path

    def taught_by(self, name: str) -> Run:
        """The run as it would be with one of its teachers alone."""
        if not self.teachers:
            return self
        data = dataclasses.replace(self.data, teacher_column=None)
        return dataclasses.replace(self, teacher=self.teachers[name], teachers={}, data=data)

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn: asked for, else prescribed by the method, else from the student itself."""
        return self.rollout.sampling or self.method.sampling or Sampling()
