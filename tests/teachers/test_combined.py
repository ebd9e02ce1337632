"""Readers made of others in a run: the same numbers as by hand, tile by tile, on what each part reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.told import COLUMN, write_world
from tropd.config.run import Run
from tropd.monitoring.alarms import Alarms
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.training.assembly import Parts, load_parts
from tropd.training.batches import ScoredBatch
from tropd.training.iteration import iterate
from tropd.training.scoring import asked_of, score
from tropd.training.source import Source
from tropd.training.step import train_step
from tropd.types import Rollout

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
METHOD = '''
from dataclasses import dataclass

from tropd import Method, Objective, Term
from tropd.objective.losses import ForwardKL, JensenShannon, ReverseKL, SampledReverseKL
from tropd.objective.selectors import STUDENT, TeacherEntropyAbove


@dataclass(frozen=True, kw_only=True)
class Whole(Method):
    """All of a reader's distribution."""

    summary = "all of a reader"
    by: str = "mixed"

    @property
    def objective(self):
        return Objective(Term("whole", STUDENT, JensenShannon(reader=self.by)))


@dataclass(frozen=True, kw_only=True)
class Parts(Method):
    """What can be read of a reader beside its whole distribution, and several at once."""

    summary = "parts of a reader"
    by: str = "mixed"

    @property
    def objective(self):
        return Objective(
            Term("pull", STUDENT & TeacherEntropyAbove(0.1, reader=self.by), SampledReverseKL(reader=self.by)),
            Term("guide", STUDENT, ForwardKL(support="teacher_top_k", top_k=5, reader=self.by)),
            Term("own", STUDENT, ReverseKL(support="student_top_k", top_k=4, reader=self.by)),
            Term("also", STUDENT, ForwardKL(support="teacher_top_k", top_k=3, reader="told")),
        )
'''
STEERED = {"base": "teacher", "plus": ["told"], "minus": ["start"], "strength": 0.5}
MIXED: dict[str, Any] = {
    "told": {"briefing": COLUMN},
    "start": {"path": "start"},
    "mixed": {"mean": ["teacher", "told", "start"]},
    "steered": {"steered": STEERED},
    "nested": {"mean": ["steered", "told"]},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "mixtures.py").write_text(METHOD)
    return folder


def mixed(world: Path, by: str = "mixed", cls: str = "Whole", readers: Any = MIXED, **changes: Any) -> Run:
    values = {
        "student": {"path": str(world / "student")},
        "teacher": {"path": str(world / "teacher")},
        "readers": readers,
        "data": {"path": str(world / "told.jsonl")},
        "method": {"name": f"mixtures.py:{cls}", "by": by},
        "rollout": {"num_prompts": 3, "num_rollouts": 1, "max_new_tokens": 24},
        "optimizer": {"learning_rate": 1e-3, "max_gradient_norm": 1e9},
        "steps": 2,
        "device": "cpu",
        "tokens_per_micro_batch": 80,
        "tile_tokens": 16,
        **changes,
    }
    return Run.from_dict(values, folder=world).imported()


def judged(parts: Parts, unread: Any = ()) -> ScoredBatch:
    """A scored batch; `unread` are (reader, rollout number) of what a reader cannot be told."""
    rollouts, objective = Source(parts).take(0).rollouts, parts.run.method.objective
    as_read = {name: parts.briefer.as_read(name, rollouts) for name in asked_of(objective, parts.readers)}
    for name, i in unread:
        as_read[name][i] = None
    recall = Needs.STUDENT_TOPK in objective.needs
    return score(rollouts, objective, parts.readers, parts.learner, seed=0, recall=recall, as_read=as_read)


def logprobs(model: Any, prompt: tuple[int, ...], response: tuple[int, ...], size: int) -> torch.Tensor:
    logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :size]
    return logits.float().log_softmax(-1)


@torch.no_grad()
def by_hand(parts: Parts, rollout: Rollout, by: str) -> torch.Tensor:
    """[T, V] of a reader, from plain forward passes and plain probabilities."""
    prompt, response, size = rollout.prompt, rollout.response_ids, parts.vocab_size
    teacher, start = parts.teacher.forward.model, parts.readers["start"].forward.model
    q = {
        "teacher": logprobs(teacher, prompt.token_ids, response, size),
        "told": logprobs(teacher, prompt.told["told"], response, size),
        "start": logprobs(start, prompt.token_ids, response, size),
    }
    q["mixed"] = ((q["teacher"].exp() + q["told"].exp() + q["start"].exp()) / 3).log()
    q["steered"] = (q["teacher"] + 0.5 * (q["told"] - q["start"])).log_softmax(-1)
    q["nested"] = ((q["steered"].exp() + q["told"].exp()) / 2).log()
    return q[by]


@pytest.mark.parametrize("by", ["mixed", "steered", "nested"])
def test_what_a_combined_reader_says_is_what_its_parts_make_by_hand(world: Path, tmp_path: Path, by: str) -> None:
    parts = load_parts(mixed(world, by, "Parts"), tmp_path)
    batch = judged(parts)
    tokens = batch.tokens.of(by)
    full = torch.cat([by_hand(parts, rollout, by) for rollout in batch.rollouts])
    at = tokens.token_ids_N[:, None]
    torch.testing.assert_close(tokens.teacher_logprobs_N, full.gather(1, at)[:, 0], **CLOSE)
    torch.testing.assert_close(tokens.teacher_topk_logprobs_NK, full.topk(5).values, **CLOSE)
    torch.testing.assert_close(full.gather(1, tokens.teacher_topk_ids_NK), tokens.teacher_topk_logprobs_NK, **CLOSE)
    own = full.gather(1, tokens.student_topk_ids_NJ)
    torch.testing.assert_close(tokens.teacher_at_student_topk_NJ, own, **CLOSE)
    torch.testing.assert_close(tokens.teacher_entropy_N, torch.special.entr(full.exp()).sum(-1), **CLOSE)
    assert tokens.peek("teacher_full_logprobs_NV") is None and tokens.peek("teacher_hidden_NH") is None
    others = set(batch.tokens.others) | {batch.tokens.reader}
    assert others == {"teacher", "told", "start", by} | ({"steered"} if by == "nested" else set())


@pytest.mark.parametrize("by", ["mixed", "steered", "nested"])
def test_the_gradient_through_a_combined_reader_is_that_of_the_dense_computation(
    world: Path, tmp_path: Path, by: str
) -> None:
    parts = load_parts(mixed(world, by), tmp_path)
    batch, objective = judged(parts), parts.run.method.objective
    loss, total = torch.zeros(()), len(batch.tokens)
    for rollout in batch.rollouts:
        own = logprobs(parts.model, rollout.prompt.token_ids, rollout.response_ids, parts.vocab_size)
        theirs = by_hand(parts, rollout, by)
        mean = ((own.exp() + theirs.exp()) / 2).log()
        shannon = 0.5 * (theirs.exp() * (theirs - mean)).sum(-1) + 0.5 * (own.exp() * (own - mean)).sum(-1)
        loss = loss + shannon.sum() / total
    trained = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    expected = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
    found = gradients(parts, batch, objective)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def gradients(parts: Parts, batch: ScoredBatch, objective: Any) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}

    def watch(seen: Any) -> None:
        found.update({n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None})

    train_step(
        batch, objective, parts.learner, Context(), tokens_per_micro_batch=80, watch=watch, teacher=parts.readers
    )
    return found


@pytest.mark.parametrize(
    ("readers", "same_as"),
    [
        ({"one": {"mean": ["told"]}}, "told"),
        ({"one": {"steered": STEERED | {"strength": 0.0}}}, "teacher"),
        ({"one": {"mean": ["two"]}, "two": {"steered": STEERED | {"base": "told", "strength": 0.0}}}, "told"),
    ],
)
def test_a_mean_of_one_and_strength_0_train_as_that_reader_does_to_the_last_bit(
    world: Path, tmp_path: Path, readers: Any, same_as: str
) -> None:
    found = []
    for by in ("one", same_as):
        parts = load_parts(mixed(world, by, readers=MIXED | readers), tmp_path)
        found.append(gradients(parts, judged(parts), parts.run.method.objective))
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


class Largest(TorchDispatchMode):
    """The most rows that a tensor as wide as the vocabulary has, the transposed head apart."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.size, self.width, self.rows = size, width, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple) else (result,):
            wide = isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == self.size
            if wide and x.shape[0] != self.width:
                self.rows = max(self.rows, x.shape[0])
        return result


@pytest.mark.parametrize("method", ["Whole", "Parts"])
def test_nothing_wider_than_a_tile_has_the_vocabulary(world: Path, tmp_path: Path, method: str) -> None:
    parts = load_parts(mixed(world, "nested", method), tmp_path)
    batch = judged(parts)
    largest = Largest(parts.vocab_size, width=parts.model.config.hidden_size)
    assert len(batch.tokens) > 2 * 16 and len(batch.tokens) != largest.width
    with largest:
        again = score(
            batch.rollouts,
            parts.run.method.objective,
            parts.readers,
            parts.learner,
            seed=0,
            recall=method == "Parts",
            as_read=batch.as_read,
        )
        gradients(parts, again, parts.run.method.objective)
    assert 0 < largest.rows <= 16


def test_a_combined_reader_reads_a_response_where_all_its_parts_do(world: Path, tmp_path: Path) -> None:
    parts = load_parts(mixed(world, "nested", "Parts"), tmp_path)
    batch = judged(parts, [("told", 0), ("start", 2)])
    read = {name: batch.tokens.of(name).peek("read_S") for name in ("teacher", "told", "start", "steered", "nested")}
    assert read["teacher"] is None
    assert read["told"].tolist() == [False, True, True] and read["start"].tolist() == [True, True, False]
    assert read["steered"].tolist() == read["nested"].tolist() == [False, True, False]
    plan = parts.run.method.objective.plan(batch.tokens, Context())
    pull_S = torch.zeros(3).index_add(0, batch.tokens.sequences_N, plan.weights["own"])
    assert pull_S[0] == pull_S[2] == 0 and pull_S[1] == pytest.approx(1.0), "others have no place in the denominator"


def test_a_run_with_combined_readers_takes_its_steps(world: Path, tmp_path: Path) -> None:
    run = mixed(world, "nested", "Parts")
    parts = load_parts(run, tmp_path)
    source = Source(parts)
    for step in range(2):
        record = iterate(parts, source, tmp_path, step, Alarms(run.alarms)).record
        assert set(record.terms) == {"pull", "guide", "own", "also"} and record.loss == record.loss


def test_combined_readers_are_in_the_file_of_the_run(world: Path, tmp_path: Path) -> None:
    run = mixed(world, "nested")
    path = tmp_path / "run.toml"
    path.write_text(run.dump())
    again = Run.load(path).imported()
    assert again.readers == run.readers and again.fingerprint() == run.fingerprint()
    other = mixed(world, "nested", readers=MIXED | {"steered": {"steered": STEERED | {"strength": 0.6}}})
    assert other.fingerprint() != run.fingerprint()


def test_a_method_prescribes_combined_readers_and_the_run_overrides_them(world: Path, tmp_path: Path) -> None:
    (world / "prescribing.py").write_text(
        METHOD
        + '''
from tropd.briefings.reader import Reader
from tropd.briefings.mixtures import Steered


@dataclass(frozen=True, kw_only=True)
class Prescribing(Whole):
    """It brings its readers."""

    @property
    def readers(self):
        return {
            "start": Reader(model="start"),
            "two": Reader(mean=("teacher", "start")),
            "mixed": Reader(steered=Steered(plus=("two",), minus=("start",), strength=0.3)),
        }
'''
    )
    method = {"name": "prescribing.py:Prescribing"}
    run = mixed(world, readers={}, method=method)
    assert run.all_readers["two"].mean == ("teacher", "start") and run.all_readers["mixed"].steered.strength == 0.3
    parts = load_parts(run, tmp_path)
    assert set(judged(parts).as_read) == {"teacher", "start", "two", "mixed"}
    changed = mixed(world, readers={"two": {"mean": ["start"]}}, method=method)
    assert changed.all_readers["two"].mean == ("start",) and changed.all_readers["mixed"].steered is not None
