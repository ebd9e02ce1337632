"""A small student really learns from a small teacher: the task is to repeat three symbols and stop."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.tiny import tiny_model
from tropd.config.stages import OptimizerConfig
from tropd.methods import GKD, OPD, Method, SeqKD, TrOPD
from tropd.methods.drafts import RolloutJob
from tropd.model.optimizer import Optimizer
from tropd.model.tiling import Tiling
from tropd.objective.context import Context
from tropd.rollout.stage import roll_out
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.local import LocalTeacher
from tropd.training.learner import ModelLearner
from tropd.training.scoring import score
from tropd.training.step import recall_needed, train_step
from tropd.types import Prompt, Rollout, Sampling

NUM_SYMBOLS, STOP, ASK, NEW_TOKENS = 6, 6, 7, 6
VOCAB = 8
PROMPTS = [
    Prompt(id=str(n), token_ids=(*symbols, ASK))
    for n, symbols in enumerate(itertools.product(range(NUM_SYMBOLS), repeat=3))
]
SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "tiling": Tiling(tokens_per_batch=4096)}


def supervised(model: Any, num_steps: int, seed: int) -> Any:
    """Plain training on the right answers."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    texts = torch.tensor([(*p.token_ids, *p.token_ids[:3], STOP) for p in PROMPTS])
    for _ in range(num_steps):
        batch = texts[torch.randint(len(texts), (64,), generator=generator)]
        logits = model(input_ids=batch).logits[:, 3:-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 4:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def fresh(seed: int) -> Any:
    return tiny_model("qwen3", seed=seed, sharp=1.0, vocab=VOCAB, layers=2)


@functools.cache
def teacher_weights() -> dict[str, torch.Tensor]:
    return supervised(fresh(1), 120, seed=0).state_dict()


@functools.cache
def student_weights() -> dict[str, torch.Tensor]:
    """One that has barely begun."""
    return supervised(fresh(2), 25, seed=1).state_dict()


def pair(learning_rate: float, teaching: type[LocalTeacher] = LocalTeacher) -> tuple[ModelLearner, LocalTeacher]:
    student, other = fresh(2), fresh(1)
    student.load_state_dict(student_weights())
    other.load_state_dict(teacher_weights())
    optimizer = Optimizer(student, OptimizerConfig(learning_rate=learning_rate), total_steps=10**6)
    return ModelLearner(student, optimizer, **SHAPE), teaching(other, **SHAPE)


def rollouts_of(
    method: Method, model: Any, writer: Any, prompts: Sequence[Prompt], step: int, progress: float
) -> list[Rollout]:
    job = RolloutJob(
        prompts=[(prompt, step) for prompt in prompts],
        num_rollouts=1,
        max_new_tokens=NEW_TOKENS,
        sampling=Sampling(),
        stop_ids=(STOP,),
        seed=0,
        progress=progress,
    )
    return roll_out(method.rollout, job, TransformersEngine(model), TransformersEngine(writer))


def divergence(learner: ModelLearner, teacher: LocalTeacher) -> float:
    """Mean KL(student || teacher) on states that the student reaches."""
    rollouts = rollouts_of(OPD(), learner.model, learner.model, PROMPTS, step=-1, progress=0.0)
    return float(learner.reverse_kl(rollouts, teacher, rollouts).mean())


def accuracy(learner: ModelLearner) -> float:
    rollouts = rollouts_of(OPD(), learner.model, learner.model, PROMPTS, step=-1, progress=0.0)
    return sum(r.response_ids == (*r.prompt.token_ids[:3], STOP) for r in rollouts) / len(rollouts)


def distil(
    method: Method, num_steps: int, learning_rate: float, teaching: type[LocalTeacher] = LocalTeacher
) -> tuple[ModelLearner, LocalTeacher]:
    learner, teacher = pair(learning_rate, teaching)
    for step in range(num_steps):
        progress = step / num_steps
        prompts = [PROMPTS[(32 * step + 7 * n) % len(PROMPTS)] for n in range(32)]
        rollouts = rollouts_of(method, learner.model, teacher.forward.model, prompts, step, progress)
        recall = recall_needed(method.objective, 1)
        batch = score(rollouts, method.objective, teacher, learner, seed=0, recall=recall)
        train_step(batch, method.objective, learner, Context(progress=progress), tokens_per_micro_batch=10_000)
    return learner, teacher


def test_the_student_begins_far_from_a_teacher_that_knows_the_task() -> None:
    learner, teacher = pair(1e-3)
    assert divergence(learner, teacher) > 0.3
    assert accuracy(learner) < 0.65
    learner.model.load_state_dict(teacher_weights())
    assert divergence(learner, teacher) == 0.0
    assert accuracy(learner) > 0.95


METHODS = [OPD(), TrOPD(guidance=False, top_k=4), TrOPD(top_k=VOCAB, beta=1.0), GKD(), SeqKD()]


@pytest.mark.parametrize("method", METHODS, ids=["opd", "tropd without prefixes", "tropd", "gkd", "seqkd"])
def test_forty_steps_halve_the_divergence_from_the_teacher_and_solve_more_of_the_task(method: Method) -> None:
    before = pair(3e-3)
    after = distil(method, 40, learning_rate=3e-3)
    assert divergence(*after) < 0.5 * divergence(*before)
    assert accuracy(after[0]) > accuracy(before[0]) + 0.15


def test_a_teacher_that_is_asked_about_other_tokens_teaches_nothing() -> None:
    """The control: the same steps with the teacher's numbers one token late."""

    class LateTeacher(LocalTeacher):
        def score(self, request):
            scores = super().score(request)
            return [dataclasses.replace(s, logprobs_T=s.logprobs_T.roll(1)) for s in scores]

    before = pair(3e-3)
    learner, teacher = distil(OPD(), 40, learning_rate=3e-3, teaching=LateTeacher)
    assert divergence(learner, teacher) > divergence(*before)
