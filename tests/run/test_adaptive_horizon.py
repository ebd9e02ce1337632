"""The horizon that follows a measurement: the controller alone, the measurement alone, and both in runs."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.one_step import judge, parts_of, write
from tests.small_runs import TROPD, run_of, write_models
from tropd.distributed.ranks import ALONE
from tropd.errors import ConfigError
from tropd.methods.adaptive_horizon import AdaptiveHorizon
from tropd.methods.policies import Done
from tropd.monitoring.records import read_records
from tropd.objective.context import Context
from tropd.objective.memory import Memory
from tropd.run.start import train
from tropd.training.alignment import Alignment
from tropd.training.assembly import Parts
from tropd.training.micro_batch import Seen
from tropd.training.scoring import score
from tropd.training.step import recall_needed, train_step
from tropd.types import Author, Prompt, Rollout

MOST = 512
OPTIMIZER = {"learning_rate": 1e-2, "epsilon": 1e-2, "max_gradient_norm": 1e9}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("world"))


def done_at(step: int, cosine: float | None, age: int = 0) -> Done:
    rollout = Rollout(
        id="0/p/0",
        prompt=Prompt(id="p", token_ids=(1,)),
        token_ids=(1, 2),
        authors=(Author.CONTEXT, Author.STUDENT),
        behavior_logprobs=(0.0, -1.0),
        policy_version=(step - age, step - age),
    )
    probes = {} if cosine is None else {"gradient/cosine": cosine}
    return Done(step=step, progress=0.5, rollouts=[rollout], probes=probes, max_new_tokens=MOST, world=ALONE)


def horizons_after(policy: AdaptiveHorizon, cosines: list[float | None], age: int = 0) -> list[int]:
    """The horizons of ordinary steps, each after one more measurement."""
    memory, found = Memory(), []
    for number, cosine in enumerate(cosines):
        policy.remember(done_at(number * policy.every + age, cosine, age), memory)
        found.append(policy.horizon(MOST, 1, 0.5, memory))
    return found


def test_the_horizon_doubles_below_low_and_holds_above() -> None:
    policy = AdaptiveHorizon(tokens=100)
    assert horizons_after(policy, [0.9, 0.99, 0.79, 0.8, 0.1, -1.0, 0.0]) == [100, 100, 200, 200, 400, 512, 512]


def test_the_horizon_shrinks_where_that_is_asked_for_but_not_below_its_start() -> None:
    policy = AdaptiveHorizon(tokens=100, shrink=0.5)
    assert horizons_after(policy, [0.1, 0.1, 0.95, 0.94, 0.95, 1.0]) == [200, 400, 200, 200, 100, 100]


def test_steps_without_a_measurement_and_old_ones_change_nothing() -> None:
    policy = AdaptiveHorizon(tokens=100, max_age=2)
    assert horizons_after(policy, [None, 0.1, None]) == [100, 200, 200]
    assert horizons_after(policy, [0.1, 0.1], age=2) == [200, 400]
    assert horizons_after(policy, [0.1, 0.1], age=3) == [100, 100]


def test_every_so_many_steps_are_whole_and_split_at_the_horizon() -> None:
    policy, memory = AdaptiveHorizon(tokens=100, every=3), Memory()
    assert [policy.horizon(MOST, step, 0.0, memory) for step in range(5)] == [MOST, 100, 100, MOST, 100]
    assert [policy.split(step, 0.0, memory) for step in range(5)] == [100, None, None, 100, None]
    assert policy.horizon(60, 1, 0.0, memory) == 60
    policy.remember(done_at(3, 0.0), memory)
    assert policy.split(6, 0.0, memory) == 200 == policy.horizon(MOST, 4, 0.0, memory)


def test_limits_that_cross_are_refused() -> None:
    with pytest.raises(ConfigError, match="grows below a cosine of 0.9"):
        AdaptiveHorizon(low=0.9, high=0.5)


def trained(folder: Path, rollouts: list[Rollout] | None, position: int | None, **changes: Any) -> tuple[Any, ...]:
    """The rollouts, the gradient, the cosine and what was watched of a step, split at a position."""
    method = changes.pop("method", TROPD)
    parts: Parts = parts_of(folder, method, optimizer=OPTIMIZER, **changes)
    rollouts = write(parts) if rollouts is None else rollouts
    split = None if position is None else Alignment(position, parts.learner.optimizer, ALONE)
    objective, seen, gradient = parts.run.method.objective, [], {}
    context = Context(progress=0.3)
    if split is None:
        batch = judge(parts, rollouts)
    else:
        recall = recall_needed(objective, 1, split)
        batch = score(rollouts, objective, parts.teacher, parts.learner, seed=0, recall=recall, context=context)

    def watch(masters: dict[str, torch.Tensor]) -> Any:
        gradient.update({name: x.grad.clone() for name, x in masters.items() if x.grad is not None})
        return torch.no_grad()

    parts.learner.optimizer.watch = split.beside(watch) if split else watch
    tokens = parts.run.tokens_per_micro_batch
    train_step(
        batch,
        objective,
        parts.learner,
        context,
        tokens_per_micro_batch=tokens,
        watch=seen.append,
        teacher=parts.teacher,
        split=split,
    )
    return rollouts, gradient, split.cosine if split else math.nan, seen


def relative(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    size = sum(float(x.double().pow(2).sum()) for x in b.values())
    return math.sqrt(sum(float((a[n] - x).double().pow(2).sum()) for n, x in b.items()) / size)


LORA = {"student": {"lora": {"rank": 4, "alpha": 8}}}


def weights_of(seen: Seen) -> list[float]:
    """Of each term and rollout."""
    return [float(weight_T.sum()) for rows in seen.weights().values() for weight_T in rows.values()]


@pytest.mark.parametrize(
    "changes",
    [{}, {"method": {"name": "entropy_opd"}}, {"method": {"name": "minillm"}}, {"method": {"name": "opd"}, **LORA}],
    ids=["tropd", "entropy_opd", "minillm", "lora"],
)
def test_the_parts_of_a_gradient_add_up_and_the_cosine_is_that_of_the_first_part(world: Path, changes: Any) -> None:
    rollouts, whole, _, plain = trained(world, None, None, **changes)
    for position in (4, 12):
        _, gradient, cosine, seen = trained(world, rollouts, position, **changes)
        assert relative(gradient, whole) < 1e-5
        assert [weights_of(one) for one in seen] == [pytest.approx(weights_of(one), rel=1e-5) for one in plain]
        alone = trained(world, rollouts, position, **changes)
        assert alone[2] == cosine, "the same to the bit, once more"
        assert -1 <= cosine < 1 - 1e-4
    assert trained(world, rollouts, 10_000, **changes)[2] == pytest.approx(1.0, abs=1e-6)
    assert math.isnan(trained(world, rollouts, 0, **changes)[2]), "no tokens, no cosine"


def test_the_cosine_is_that_of_two_gradients_taken_apart(world: Path) -> None:
    """Of `opd`, whose weight at a token is 1 / the number of tokens: the first part is a step on shorter responses."""
    method, position = {"name": "opd"}, 5
    rollouts, whole, _, _ = trained(world, None, None, method=method)
    short = [
        replace(
            r,
            token_ids=r.token_ids[: len(r.prompt.token_ids) + position],
            authors=r.authors[: len(r.prompt.token_ids) + position],
            behavior_logprobs=r.behavior_logprobs[: len(r.prompt.token_ids) + position],
            model_logprobs=(),
        )
        for r in rollouts
    ]
    _, first, _, _ = trained(world, short, None, method=method)
    dot = sum(float((first[name].double() * x.double()).sum()) for name, x in whole.items())
    sizes = [math.sqrt(sum(float(x.double().pow(2).sum()) for x in g.values())) for g in (first, whole)]
    for tokens in (10_000, 1):
        cosine = trained(world, rollouts, position, method=method, tokens_per_micro_batch=tokens)[2]
        assert cosine == pytest.approx(dot / (sizes[0] * sizes[1]), abs=1e-5)


def test_a_run_measures_every_so_many_steps_and_its_horizon_follows(world: Path, tmp_path: Path) -> None:
    method = {"name": "adwin", "horizon": {"tokens": 3, "every": 2, "low": 1.0, "high": 1.0}}
    directory = train(run_of(world, method, output=str(tmp_path / "run"), steps=6))
    records = read_records(directory / "records.jsonl").steps
    assert [record.probes.get("rollout/horizon") for record in records] == [None, 6, None, 12, None, 24]
    assert ["gradient/cosine" in record.probes for record in records] == [True, False] * 3
    assert all(-1 <= record.probes.get("gradient/cosine", 0) <= 1 for record in records)
