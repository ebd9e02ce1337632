"""A run with several readers: each reads its own prompt, models are shared, and the student learns from all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.told import COLUMN, by_hand, write_world
from tropd.config.run import Run
from tropd.errors import ConfigError, DataError, EvidenceError
from tropd.monitoring.alarms import Alarms
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.training.assembly import Parts, load_parts
from tropd.training.batches import ScoredBatch
from tropd.training.iteration import iterate
from tropd.training.scoring import score
from tropd.training.source import Source
from tropd.training.step import train_step

CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-4}
METHOD = '''
from dataclasses import dataclass

from tropd import Method, Objective, Term
from tropd.objective.losses import ForwardKL, JensenShannon, SampledReverseKL
from tropd.objective.selectors import STUDENT


@dataclass(frozen=True, kw_only=True)
class Council(Method):
    """Three opinions."""

    summary = "three opinions"

    @property
    def objective(self):
        return Objective(
            Term("pull", STUDENT, SampledReverseKL(), weight=0.1),
            Term("whole", STUDENT, JensenShannon(reader="solved")),
            Term("guide", STUDENT, ForwardKL(support="teacher_top_k", top_k=6, reader="elder")),
        )
'''
READERS: dict[str, Any] = {"solved": {"briefing": COLUMN}, "elder": {"path": "start"}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_world(tmp_path_factory.mktemp("world"))
    (folder / "council.py").write_text(METHOD)
    return folder


def council(world: Path, readers: Any = READERS, **changes: Any) -> Run:
    values = {
        "student": {"path": str(world / "student")},
        "teacher": {"path": str(world / "teacher")},
        "readers": readers,
        "data": {"path": str(world / "told.jsonl")},
        "method": {"name": "council.py:Council"},
        "rollout": {"num_prompts": 3, "num_rollouts": 1, "max_new_tokens": 24},
        "optimizer": {"learning_rate": 1e-3},
        "steps": 2,
        "device": "cpu",
        "tokens_per_micro_batch": 80,
        "tile_tokens": 16,
        **changes,
    }
    return Run.from_dict(values, folder=world).imported()


def judged(parts: Parts) -> ScoredBatch:
    rollouts, objective = Source(parts).take(0).rollouts, parts.run.method.objective
    as_read = {name: parts.briefer.as_read(name, rollouts) for name in objective.readers}
    return score(rollouts, objective, parts.readers, parts.learner, seed=0, recall=False, as_read=as_read)


def test_each_reader_gives_what_is_read_of_it_on_its_own_prompt(world: Path, tmp_path: Path) -> None:
    parts = load_parts(council(world), tmp_path)
    batch = judged(parts)
    size = parts.vocab_size
    teacher, student = parts.teacher.forward.model, parts.model
    for name, model in (("teacher", teacher), ("solved", teacher), ("elder", student)):
        own = [
            by_hand(model, r.prompt.told.get(name, r.prompt.token_ids), r.response_ids, size) for r in batch.rollouts
        ]
        torch.testing.assert_close(batch.tokens.of(name).teacher_logprobs_N, torch.cat(own), **CLOSE)
    given = {
        name: {f for f in batch.tokens.of_reader if batch.tokens.of(name).peek(f) is not None} for name in parts.readers
    }
    assert given == {
        "teacher": {"teacher_logprobs_N"},
        "solved": {"teacher_logprobs_N", "teacher_hidden_NH"},
        "elder": {"teacher_logprobs_N", "teacher_topk_ids_NK", "teacher_topk_logprobs_NK"},
    }


def test_a_reader_with_the_teachers_model_holds_no_second_copy(world: Path, tmp_path: Path) -> None:
    parts = load_parts(council(world), tmp_path)
    assert parts.readers["solved"] is parts.teacher and parts.readers["elder"] is not parts.teacher
    self_taught = council(
        world, teacher={"path": "start"}, student={"path": str(world / "student"), "lora": {"rank": 2}}
    )
    parts = load_parts(self_taught, tmp_path)
    assert parts.readers["elder"] is parts.readers["solved"] is parts.teacher
    assert parts.teacher.forward.model is parts.model


def test_the_gradient_of_several_readers_is_that_of_the_dense_computation(world: Path, tmp_path: Path) -> None:
    """Through tiles of whole distributions and two readers' columns, against one autograd graph of everything."""
    parts = load_parts(council(world, optimizer={"learning_rate": 1e-3, "max_gradient_norm": 1e9}), tmp_path)
    batch, objective, size = judged(parts), parts.run.method.objective, parts.vocab_size
    loss, total = torch.zeros(()), len(batch.tokens)
    teacher, start = parts.teacher.forward.model, parts.readers["elder"].forward.model

    def logprobs(model: Any, prompt: tuple[int, ...], response: tuple[int, ...]) -> torch.Tensor:
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1, :size]
        return logits.float().log_softmax(-1)

    for rollout in batch.rollouts:
        prompt, response = rollout.prompt, rollout.response_ids
        own = logprobs(parts.model, prompt.token_ids, response)
        with torch.no_grad():
            plain, solved, elder = (
                logprobs(model, ids, response)
                for model, ids in (
                    (teacher, prompt.token_ids),
                    (teacher, prompt.told["solved"]),
                    (start, prompt.token_ids),
                )
            )
        at = torch.tensor(response)[:, None]
        drawn, theirs = own.gather(1, at)[:, 0], plain.gather(1, at)[:, 0]
        mean = ((own.exp() + solved.exp()) / 2).log()
        shannon = 0.5 * (solved.exp() * (solved - mean)).sum(-1) + 0.5 * (own.exp() * (own - mean)).sum(-1)
        top = elder.topk(6)
        forward = (top.values.exp() * (top.values - own.gather(1, top.indices))).sum(-1)
        pull = (drawn - theirs).detach() * drawn
        loss = loss + (0.1 * pull + shannon + forward).sum() / total
    expected = torch.autograd.grad(loss, [p for p in parts.model.parameters() if p.requires_grad])
    found: dict[str, torch.Tensor] = {}

    def watch(seen: Any) -> None:
        found.update({n: p.grad.clone() for n, p in parts.model.named_parameters() if p.grad is not None})

    train_step(
        batch, objective, parts.learner, Context(), tokens_per_micro_batch=80, watch=watch, teacher=parts.readers
    )
    names = [name for name, p in parts.model.named_parameters() if p.requires_grad]
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_a_run_with_several_readers_takes_its_steps(world: Path, tmp_path: Path) -> None:
    run = council(world)
    parts = load_parts(run, tmp_path)
    source = Source(parts)
    for step in range(2):
        record = iterate(parts, source, tmp_path, step, Alarms(run.alarms)).record
        assert set(record.terms) == {"pull", "whole", "guide"} and record.loss == record.loss


@pytest.mark.parametrize(
    ("readers", "said"),
    [
        (
            {"solved": {"briefing": COLUMN}},
            r"reads what reader 'elder' says.*Add a section \[readers.elder\]",
        ),
        (READERS | {"teacher": {}}, r"\[readers.teacher\], but the reader \"teacher\" has the section \[teacher\]"),
        (READERS | {"a b": {}}, "reader 'a b' has no name of letters"),
        (READERS | {"solved": {"servers": ["http://127.0.0.1:1"]}}, "'solved' has the path \"teacher\".*no servers"),
        (READERS | {"elder": {"path": "base"}}, "'elder'.*\"base\""),
        (READERS | {"elder": {"path": "nowhere"}}, "nowhere"),
        (READERS | {"solved": {"briefing": {"kind": "column", "column": "proof"}}}, "reader 'solved'.*'proof'"),
        (READERS | {"elder": {"servers": ["http://127.0.0.1:1"], "path": "start"}}, "reader 'elder': teacher.servers"),
    ],
)
def test_a_wrong_reader_is_refused_before_the_run(world: Path, tmp_path: Path, readers: Any, said: str) -> None:
    with pytest.raises((ConfigError, EvidenceError, DataError), match=said):
        load_parts(council(world, readers), tmp_path)


def test_the_readers_are_in_the_file_of_the_run_and_in_its_fingerprint(world: Path, tmp_path: Path) -> None:
    run = council(world)
    path = tmp_path / "run.toml"
    path.write_text(run.dump())
    again = Run.load(path).imported()
    assert again.readers == run.readers and again.fingerprint() == run.fingerprint()
    other = council(world, READERS | {"elder": {"path": "student"}})
    assert other.fingerprint() != run.fingerprint()


OVERLAP = '''
from dataclasses import dataclass

from tropd import Method, Objective, Term
from tropd.objective.evidence import Needs
from tropd.objective.losses import ForwardKL
from tropd.objective.selectors import STUDENT
from tropd.objective.terms import Selector


@dataclass(frozen=True)
class Overlap(Selector):
    """The student's mass on the reader's likeliest tokens, and on its own, when the batch is planned."""

    own_needs = Needs.TOPK | Needs.STUDENT_TOPK | Needs.STUDENT_AT_TOPK
    teacher_top_k = student_top_k = 5

    def __call__(self, tokens, context):
        return tokens.student_at_topk_NK.exp().sum(-1) * tokens.student_topk_logprobs_NJ.exp().sum(-1)


@dataclass(frozen=True, kw_only=True)
class Overlapping(Method):
    @property
    def objective(self):
        guide = ForwardKL(support="teacher_top_k", top_k=5)
        return Objective(
            Term("guide", STUDENT & Overlap(), guide), Term("elder", STUDENT & Overlap(reader="elder"), guide)
        )
'''


def test_selectors_see_the_student_at_the_readers_likeliest_tokens(world: Path, tmp_path: Path) -> None:
    """The planned weights are those of the whole distributions, reader by reader, in micro-batches of any size."""
    (world / "overlapping.py").write_text(OVERLAP)
    parts = load_parts(council(world, method={"name": "overlapping.py:Overlapping"}), tmp_path)
    batch, objective = judged(parts), parts.run.method.objective
    plan = objective.plan(batch.tokens)
    whole = parts.learner.forward.measure(batch.rollouts, Needs.FULL).full_logprobs_NV
    own_N = whole.topk(5).values.exp().sum(-1)
    for term, name in (("guide", "teacher"), ("elder", "elder")):
        there_N = whole.gather(1, batch.tokens.of(name).teacher_topk_ids_NK).exp().sum(-1)
        torch.testing.assert_close(plan.weights[term] * plan.counts.actions, there_N * own_N, rtol=1e-4, atol=1e-5)
    weights: dict[str, dict[str, torch.Tensor]] = {"guide": {}, "elder": {}}

    def watch(seen: Any) -> None:
        for term, by_rollout in seen.weights().items():
            weights[term].update(by_rollout)

    readers = parts.readers
    train_step(batch, objective, parts.learner, Context(), tokens_per_micro_batch=40, watch=watch, teacher=readers)
    for term, by_rollout in weights.items():
        torch.testing.assert_close(torch.cat([by_rollout[r.id] for r in batch.rollouts]), plan.weights[term])
