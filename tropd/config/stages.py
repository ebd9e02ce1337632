"""The sections of a run that say what its stages do: data, rollouts, optimiser, evaluation, checkpoints, processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import PlainValidator
from tyro.conf import Fixed, Suppress

from tropd.base.names import Own, shown
from tropd.base.ranges import Count, Finite, LearningRate, NotNegative, Positive, Range, Ranged, Whole
from tropd.config.models import GIVEN, ServerConfig
from tropd.config.policies import read_policies, read_policy
from tropd.errors import ConfigError
from tropd.types import Sampling

_Beta = Annotated[float, Range(at_least=0, below=1)]
_OWN_KWARGS = {"conversation", "tokenize", "add_generation_prompt", "chat_template", "return_tensors", "return_dict"}
MOST_ROLLOUTS = 2**20
"""Of a step.  More are a slip of the keyboard, and would be prepared for hours before the first token."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Ranged):
    section = "data"

    path: str = GIVEN
    """A .jsonl, .json or .parquet file, a folder saved by `datasets`, or the id of a data set on the hub."""
    split: str = "train"
    """Of a hub data set or a saved folder; a file is one split."""
    name: str | None = None
    """The hub data set's configuration, such as "main"."""
    prompt_column: str = "prompt"
    """Text, or a list of messages."""
    messages_column: str = "messages"
    """A list of messages; read when there is no prompt column."""
    answer_column: str = "answer"
    """What the grader compares with."""
    id_column: str | None = None
    """Unique names of the rows; without it a prompt is named by a hash of its content."""
    teacher_column: str | None = None
    """Which teacher scores the prompt."""
    response_column: str | None = None
    """A written answer, kept as off-policy text."""
    last_assistant: Literal["drop", "prefix"] = "drop"
    """What becomes of an assistant's turn at the end of a conversation: forgotten, or kept as off-policy text."""
    max_prompt_tokens: Count | None = None
    """Longer prompts are skipped. At least 1."""
    on_bad_row: Literal["skip", "refuse"] = "skip"
    """Whether rows that are empty, malformed, too long or duplicates are left out or stop the run."""
    limit: Count | None = None
    """Stop after this many prompts. At least 1."""
    streaming: bool = False
    """Render rows when they are needed, in the data set's order, instead of all at the start."""
    system_prompt: str | None = None
    """Put before conversations that do not open with their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Handed to the chat template, such as enable_thinking."""
    apply_chat_template: bool = True
    """Whether a prompt that is plain text becomes a user's message (if the tokenizer has a chat template)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if taken := sorted(_OWN_KWARGS & set(self.chat_template_kwargs)):
            raise ConfigError(f"data.chat_template_kwargs sets {taken[0]}, which tropd decides. Leave it out.")


def _engine(value: Any) -> Own | None:
    return value if value is None or isinstance(value, Own) else Own.read(value, "engine", "rollout.engine")


@dataclass(frozen=True, kw_only=True)
class RolloutConfig(Ranged):
    section = "rollout"

    num_prompts: Count = 16
    """Prompts per step (TrOPD: 128; 16 is for a small GPU). At least 1."""
    num_rollouts: Count = 4
    """Responses per prompt (TrOPD: 4). At least 1."""
    max_new_tokens: Count = 512
    """Tokens of an answer at most (TrOPD: 8,096; 512 is for a small GPU). At least 1."""
    engine: Annotated[Any, PlainValidator(_engine), Fixed, Suppress] = None
    """What writes them instead of this process's own engine: yours, as "package.module:Class" or "file.py:Class"."""
    policy: Annotated[Any, PlainValidator(read_policy), Fixed, Suppress] = None
    """Who writes which token, where that is not left to the method: on_policy, teacher_prefix, teacher_text, mixture,
    phased, replay, blended, mixed_sampling, interleaved, agreement_stop, or your own as "package.module:Class" or
    "file.py:Class"."""
    plus: Annotated[Any, PlainValidator(read_policies), Fixed, Suppress] = ()
    """Policies beside that one, such as a horizon: how far the student writes, how its tokens are drawn."""
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

    @property
    def named(self) -> dict[str, Own]:
        """The engine and the policy, where they are named."""
        parts = {"rollout.engine": self.engine, "rollout.policy": self.policy}
        parts |= {f"rollout.plus.{i}": part for i, part in enumerate(self.plus)}
        return {key: part for key, part in parts.items() if part is not None}

    def __post_init__(self) -> None:
        object.__setattr__(self, "engine", _engine(self.engine))
        object.__setattr__(self, "policy", read_policy(self.policy))
        object.__setattr__(self, "plus", read_policies(self.plus))
        super().__post_init__()
        if self.engine is not None and self.servers:
            raise ConfigError(
                f"rollout.servers names servers, but rollout.engine is {shown(self.engine.name)}, which writes the "
                "rollouts itself: they would never be asked. Leave one of them out."
            )
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
class EvalConfig(Ranged):
    """How answers are drawn and judged."""

    section = "evaluation"

    num_samples: Count = 4
    """Sampled answers per prompt; their mean score is avg@n. At least 1."""
    pass_k: tuple[Count, ...] = (1,)
    """For which k to estimate pass@k; none above num_samples. Each at least 1."""
    correct_from: Finite = 1.0
    """An answer is correct, for pass@k, from this score on. Any finite number."""
    greedy: bool = True
    """Also take the likeliest answer of each prompt."""
    sampling: Sampling = field(default_factory=Sampling)
    max_new_tokens: Count = 256
    """At least 1."""
    limit: Count | None = None
    """Only the first so many prompts. At least 1."""
    seed: Whole = 0
    """At least 0."""
    grader: str | None = None
    """A name in tropd.data.graders, or your own as "package.module:name" or "file.py:name"."""
    prompts_per_call: Count = 64
    """Prompts handed to the engine at once; progress is saved after each call. At least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        bad = [k for k in self.pass_k if k > self.num_samples]
        if bad:
            raise ConfigError(
                f"pass@{bad[0]} was asked of {self.num_samples} samples per prompt. "
                f"Set num_samples to at least {max(self.pass_k)}, or take it out of pass_k (1 <= k <= num_samples)."
            )
        if self.sampling.temperature == 0.0 and self.num_samples > 1:
            raise ConfigError(
                f"{self.num_samples} samples were asked at temperature 0, where all are the same. "
                "Set num_samples = 1, or a temperature above 0 (the greedy answer is taken apart, see `greedy`)."
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
