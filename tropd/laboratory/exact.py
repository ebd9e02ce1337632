"""`tropd exact`: distillation between two tables, where every divergence is a sum and no number is sampled.

The stages are those of a real run: roll out, score, plan, micro-batches, step.  Only the models are small: an exact
teacher, and a student that differs from it at half of the states.  The result says what a table cannot show.
"""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Annotated

import torch

from tropd.base.ranges import Count, Positive, Range, Ranged, Share
from tropd.errors import ConfigError
from tropd.laboratory.tabular import END, TabularLM, sequence_kl, total_variation
from tropd.laboratory.tabular_pair import TabularPair
from tropd.methods import OPD, FullFKL, Method, SeqKD, TrOPD
from tropd.methods.drafts import RolloutJob
from tropd.objective.context import Context
from tropd.objective.memory import Memory
from tropd.rollout.stage import roll_out
from tropd.training.scoring import score
from tropd.training.step import recall_needed, train_step
from tropd.types import Sampling


@dataclass(frozen=True, kw_only=True)
class Setting(Ranged):
    """The models and the length of the training."""

    num_prompts: Count = 4
    """At least 1."""
    vocab_size: Annotated[int, Range(at_least=2)] = 32
    """At least 2."""
    max_new_tokens: Count = 12
    """At least 1."""
    num_rollouts: Count = 16
    """Responses to each prompt in a step. At least 1."""
    num_steps: Count = 100
    """At least 1."""
    num_seeds: Count = 5
    """Each seed is another pair of tables; every method starts from the same ones. At least 1."""
    learning_rates: tuple[Positive, ...] = (0.03, 0.1, 0.3)
    """Constant learning rates of Adam. Each above 0."""
    top_k: Count = 8
    """The teacher's top-k, for the methods that read it. At least 1."""
    sharpness: Positive = 6.0
    """Standard deviation of the student's logits at states where it differs from the teacher. Above 0."""
    astray: Share = 0.5
    """Share of these states; at others the student is close to the teacher. In [0, 1]."""
    tokens_per_micro_batch: Count = 300
    """At least 1."""
    measure_every: Count = 5
    """At least 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.learning_rates:
            raise ConfigError("the demonstration was asked for without any learning rate. Give at least one.")


ARMS: dict[str, Callable[[int], Method]] = {
    "TrOPD": lambda top_k: TrOPD(top_k=top_k),
    "TrOPD, no prefixes": lambda top_k: TrOPD(top_k=top_k, guidance=False),
    "OPD": lambda top_k: OPD(),
    "Full FKL": lambda top_k: FullFKL(top_k=top_k),
    "SeqKD": lambda top_k: SeqKD(),
}
"""The methods to compare, each with its own defaults except top_k."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One training run; entry i of every list but the last belongs to steps[i]."""

    arm: str
    learning_rate: float
    seed: int
    steps: tuple[int, ...]
    reverse_kl: tuple[float, ...]
    """KL(student || teacher) of whole responses, exact."""
    forward_kl: tuple[float, ...]
    """KL(teacher || student) of whole responses, exact."""
    total_variation: tuple[float, ...]
    """Total variation of next-token distributions, at the states that the student visits."""
    gradient_norm: tuple[float, ...]
    """At each step, before clipping."""


def make_tables(setting: Setting, seed: int, learning_rate: float) -> tuple[TabularLM, TabularLM]:
    """A student and its teacher, equally likely to end a response."""
    size = (setting.num_prompts, setting.vocab_size)
    teacher = TabularLM.random(*size, 2 * seed, sharp=2.5)
    own = TabularLM.random(*size, 2 * seed + 1, sharp=setting.sharpness).logits.detach()
    g = torch.Generator().manual_seed(seed)
    near = teacher.logits.detach() + 0.5 * torch.randn(own.shape, generator=g, dtype=own.dtype)
    astray = torch.rand(*own.shape[:2], 1, generator=g) < setting.astray
    student = TabularLM(torch.where(astray, own, near), learning_rate=learning_rate)
    with torch.no_grad():
        for model in (student, teacher):
            model.logits[..., END] = model.logits[..., 1:].logsumexp(-1) - 1.5
    return student, teacher


def distil(method: Method, student: TabularLM, teacher: TabularLM, setting: Setting, seed: int) -> Iterator[float]:
    """Train, one step per iteration; yields the norm of its gradient before clipping."""
    objective, memory = method.objective, Memory()
    for step in range(setting.num_steps):
        progress = step / setting.num_steps
        # A prompt of a table comes back at every step; named anew, its teacher texts are new too.
        prompts = [(dataclasses.replace(p, id=f"{p.id}@{step}"), 0) for p in student.prompts()]
        job = RolloutJob(
            prompts=prompts,
            num_rollouts=setting.num_rollouts,
            max_new_tokens=method.rollout.horizon(setting.max_new_tokens, step, progress, memory),
            budget=setting.max_new_tokens,
            sampling=method.sampling or Sampling(),
            stop_ids=(END,),
            seed=seed,
            progress=progress,
        )
        rollouts = roll_out(method.rollout, job, student, teacher, TabularPair(student, teacher))
        batch = score(rollouts, objective, teacher, student, seed=seed, recall=recall_needed(objective, 1))
        sums = train_step(
            batch,
            objective,
            student,
            Context(progress=progress),
            tokens_per_micro_batch=setting.tokens_per_micro_batch,
        )
        yield sums.gradient_norms[0]


@torch.no_grad()
def divergences(student: TabularLM, teacher: TabularLM, max_new_tokens: int) -> tuple[float, float, float]:
    """KL(student || teacher), KL(teacher || student), total variation."""
    reverse = float(sequence_kl(student, teacher, max_new_tokens))
    forward = float(sequence_kl(teacher, student, max_new_tokens))
    return reverse, forward, total_variation(student, teacher, max_new_tokens)


def run_one(asked: tuple[str, float, int, Setting]) -> Curve:
    """One method, one learning rate, one pair."""
    arm, learning_rate, seed, setting = asked
    student, teacher = make_tables(setting, seed, learning_rate)
    steps, measured, norms = [0], [divergences(student, teacher, setting.max_new_tokens)], []
    for norm in distil(ARMS[arm](setting.top_k), student, teacher, setting, seed):
        norms.append(norm)
        if len(norms) % setting.measure_every == 0 or len(norms) == setting.num_steps:
            steps.append(len(norms))
            measured.append(divergences(student, teacher, setting.max_new_tokens))
    reverse, forward, variation = zip(*measured, strict=True)
    return Curve(
        arm=arm,
        learning_rate=learning_rate,
        seed=seed,
        steps=tuple(steps),
        reverse_kl=reverse,
        forward_kl=forward,
        total_variation=variation,
        gradient_norm=tuple(norms),
    )


def run_all(setting: Setting, workers: int = 1) -> Iterator[Curve]:
    """Every method at every learning rate on every pair, in that order, for any number of workers."""
    asked = [
        (arm, rate, seed, setting)
        for rate in setting.learning_rates
        for arm in ARMS
        for seed in range(setting.num_seeds)
    ]
    if workers == 1:
        yield from map(run_one, asked)
        return
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_core)
    try:
        yield from pool.map(run_one, asked)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_core() -> None:
    """Restrict a worker to one core, and leave Ctrl-C to the process that started it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def smallest_log_ratio(setting: Setting) -> float:
    """The lowest log pi_T - log pi_S at any token that a student gives at least 1 % at the start."""
    lowest = 0.0
    for seed in range(setting.num_seeds):
        student, teacher = (m.logits.detach().log_softmax(-1) for m in make_tables(setting, seed, 1.0))
        likely = student.exp() >= 0.01
        lowest = min(lowest, float((teacher - student)[likely].min()))
    return lowest
