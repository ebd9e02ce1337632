"""H7 and H8: scoring and training without generation, and what padding costs."""

from __future__ import annotations

import random
from typing import Any

from torch import Tensor

from benchmarks.gpu_check.sizes import Sizes, make_model, seconds
from benchmarks.gpu_check.table import Table
from tropd.config.stages import OptimizerConfig
from tropd.methods import TrOPD
from tropd.model.forward import PROBE, Forward, similar_lengths
from tropd.model.layout import lay_out
from tropd.model.optimizer import Optimizer
from tropd.model.spans import NoSpans
from tropd.model.tiling import Tiling
from tropd.objective.context import Context
from tropd.teachers.local import LocalTeacher
from tropd.training.learner import ModelLearner
from tropd.training.scoring import score
from tropd.training.step import train_step
from tropd.types import Author, Finish, Prompt, Rollout


def run(s: Sizes, table: Table, items: tuple[str, ...]) -> None:
    student, teacher = make_model(s.packed, s), make_model(s.packed, s)
    with table.guard("H7 score and train", ">= 27 k tokens/s"):
        _score_and_train(student, teacher, s, table)
    del teacher
    with table.guard("H8 without padding / padded", ">= 1.5"):
        _padding(student, s, table)


def _rollout(number: int, length: int, s: Sizes, numbers: random.Random) -> Rollout:
    """A random text; its own log-probabilities are made up, as all that is timed here does not depend on them."""
    num_prompt = max(1, min(s.prompt_tokens, length // 2))
    written = length - num_prompt
    ids = tuple(numbers.randrange(s.vocabulary) for _ in range(length))
    logprobs = (0.0,) * num_prompt + (-5.0,) * written
    return Rollout(
        id=str(number),
        prompt=Prompt(id=str(number), token_ids=ids[:num_prompt]),
        token_ids=ids,
        authors=(Author.CONTEXT,) * num_prompt + (Author.STUDENT,) * written,
        behavior_logprobs=logprobs,
        model_logprobs=logprobs,
        finish=Finish.LENGTH,
    )


def _score_and_train(student: Any, teacher: Any, s: Sizes, table: Table) -> None:
    numbers = random.Random(0)
    length = s.packed_tokens // 16
    rollouts = [_rollout(i, length, s, numbers) for i in range(16)]
    tiling = Tiling(tokens_per_batch=s.packed_tokens, tile_tokens=s.head_tile)
    optimizer = Optimizer(student.requires_grad_(True), OptimizerConfig(learning_rate=1e-6), 100)
    learner = ModelLearner(student, optimizer, vocab_size=s.vocabulary, tiling=tiling)
    judge = LocalTeacher(teacher, vocab_size=s.vocabulary, tiling=tiling)
    objective = TrOPD(guidance=False, trust="threshold", top_k=min(64, s.vocabulary)).objective

    def step() -> None:
        batch = score(rollouts, objective, judge, learner, seed=0, recall=False)
        train_step(batch, objective, learner, Context(), tokens_per_micro_batch=s.packed_tokens)

    step()
    took = min(seconds(step, s) for _ in range(max(2, s.repeats - 2)))
    num_tokens = sum(len(r.token_ids) for r in rollouts)
    rate, parameters = num_tokens / took, sum(p.numel() for p in student.parameters())
    table.bar(
        f"H7 score and train, {parameters / 1e9:.2f} billion parameters each, {num_tokens} tokens a step",
        ">= 27 k tokens/s",
        f"{rate / 1e3:.1f} k tokens/s",
        rate >= 27_000 if s.judged else None,
        note=f"optimiser included; {took:.3f} s",
        seconds=took,
    )
    student.zero_grad(set_to_none=True)


def _padding(model: Any, s: Sizes, table: Table) -> None:
    """Forward and backward of the model without its head, lengths drawn from an exponential distribution."""
    numbers = random.Random(1)
    shortest, longest = s.packed_lengths
    lengths: list[int] = []
    while sum(lengths) < s.packed_tokens // 2:
        lengths.append(int(min(longest, max(shortest, numbers.expovariate(4 / longest)))))
    rollouts = [_rollout(i, n, s, numbers) for i, n in enumerate(lengths)]
    model.requires_grad_(True)
    forward = Forward(model, vocab_size=s.vocabulary)

    def backward(hidden_NH: Tensor) -> None:
        hidden_NH.float().square().mean().backward()
        model.zero_grad(set_to_none=True)

    def rectangle() -> None:
        sequences = [r.token_ids for r in rollouts]
        backward(forward._layers(lay_out(sequences, [len(r.prompt.token_ids) for r in rollouts], "padded"))[-1])

    def grouped() -> None:
        for group in similar_lengths(lengths, s.packed_tokens):
            backward(forward.hidden([rollouts[i] for i in group]))

    def spans() -> None:
        backward(forward._layers(lay_out([r.token_ids for r in rollouts], [1] * len(rollouts), "packed"), lengths)[-1])

    found: dict[str, float] = {}
    for name, side in (("one rectangle", rectangle), ("similar lengths", grouped), ("spans", spans)):
        with table.guard(f"H8 {name}"):
            if name == "spans" and not _same_by_span(forward):
                raise ValueError("a probe finds other hidden states, so this model is not packed")
            side()
            found[name] = min(seconds(side, s) for _ in range(2))
            table.tell(
                f"H8 {name}, {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens",
                f"{sum(lengths) / found[name] / 1e3:.1f} k tokens/s",
                seconds=found[name],
            )
    best = min(set(found) & {"similar lengths", "spans"}, key=lambda name: found[name])
    ratio = found["one rectangle"] / found[best]
    table.bar(
        "H8 without padding / padded",
        ">= 1.5",
        f"{ratio:.2f}",
        ratio >= 1.5 if s.judged else None,
        note=f"{best}; tropd itself groups similar lengths on CUDA, and uses spans on CPUs",
        **found,
    )


def _same_by_span(forward: Forward) -> bool:
    try:
        return forward._packs(PROBE)
    except NoSpans:
        return False
