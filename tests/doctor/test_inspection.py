"""A kept step can be looked at: what is broken is named, what is odd comes first, and it can be planned again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.small_runs import run_of, save_model, write_models
from tropd.cli.main import main
from tropd.doctor.inspection import read_step
from tropd.errors import ConfigError
from tropd.methods.drafts import RolloutJob
from tropd.methods.policies import TeacherPrefix
from tropd.monitoring.rollouts import write_rollouts
from tropd.objective.context import Context
from tropd.rollout.stage import roll_out
from tropd.run.start import assemble
from tropd.training.assembly import Parts
from tropd.training.batches import ScoredBatch
from tropd.training.kept_batch import save_batch
from tropd.training.scoring import score
from tropd.types import Author

STEP = 1


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    world = write_models(tmp_path_factory.mktemp("world"))
    save_model(world / "teacher", seed=1, sharp=12.0)
    return assemble(run_of(world), world / "texts")


@pytest.fixture(scope="module")
def batch(parts: Parts) -> ScoredBatch:
    """Rollouts half written by the teacher, scored as in a step."""
    policy = parts.run.policy
    assert isinstance(policy, TeacherPrefix)
    job = RolloutJob(
        prompts=parts.stream.next(2),
        num_rollouts=2,
        max_new_tokens=12,
        sampling=parts.run.sampling,
        stop_ids=parts.stop_ids,
        seed=0,
        progress=STEP / parts.run.steps,
    )
    rollouts = roll_out(policy, job, parts.engine, parts.writer)
    return score(rollouts, parts.run.method.objective, parts.teacher, parts.learner, seed=0, recall=False)


@pytest.fixture
def directory(parts: Parts, tmp_path: Path) -> Path:
    (tmp_path / "run.toml").write_text(parts.run.dump())
    return tmp_path


def changed(batch: ScoredBatch, row: int, value: float) -> ScoredBatch:
    teacher_N = batch.tokens.teacher_logprobs_N.clone()
    teacher_N[row] = value
    return dataclasses.replace(batch, tokens=batch.tokens.with_(teacher_logprobs_N=teacher_N))


def row_of_student(batch: ScoredBatch) -> int:
    return int((batch.tokens.authors_N == Author.STUDENT).nonzero()[3])


def test_a_kept_batch_is_planned_again_to_the_same_weights(parts: Parts, batch: ScoredBatch, directory: Path) -> None:
    save_batch(directory, STEP, batch)
    kept = read_step(directory, STEP, parts.run)
    plan = parts.run.method.objective.plan(batch.tokens, Context(progress=STEP / parts.run.steps))
    assert kept.weights.keys() == plan.weights.keys() == {"trusted", "outlier", "guidance"}
    assert all(torch.equal(kept.weights[name], plan.weights[name]) for name in plan.weights)
    assert any("again on this evidence works" in finding for finding in kept.findings)
    weight_N, reward_N = plan.weights["trusted"], plan.rewards["trusted"]
    assert kept.losses["trusted"] == pytest.approx(-float((weight_N * reward_N).sum()), rel=1e-5)
    assert kept.losses["outlier"] == "needs the student's forward pass"


def test_evidence_that_is_not_finite_is_named_with_its_place(parts: Parts, batch: ScoredBatch, directory: Path) -> None:
    row = row_of_student(batch)
    save_batch(directory, STEP, changed(batch, row, torch.nan))
    kept = read_step(directory, STEP, parts.run)
    assert kept.worst(1) == [row]
    where = f"sequence {int(batch.tokens.sequences_N[row])}"
    place = f"position {int(batch.tokens.positions_N[row])}."
    assert kept.findings[0].startswith("`teacher_logprobs_N` is not finite in 1 of ")
    assert where in kept.findings[0] and kept.findings[0].endswith(place)
    assert "is refused: `teacher_logprobs_N` holds NaN in 1 places" in kept.findings[1]


def test_a_token_that_the_teacher_finds_impossible_comes_first(
    parts: Parts, batch: ScoredBatch, directory: Path
) -> None:
    row = row_of_student(batch)
    save_batch(directory, STEP, changed(batch, row, -torch.inf))
    kept = read_step(directory, STEP, parts.run)
    assert kept.worst(1) == [row] and "-inf" in kept.findings[0]
    assert any("works" in finding for finding in kept.findings), "TrOPD bounds the log-ratio"


def test_saved_rollouts_show_the_same_tokens_as_the_batch(parts: Parts, batch: ScoredBatch, directory: Path) -> None:
    save_batch(directory, STEP, batch)
    whole = read_step(directory, STEP, parts.run)
    write_rollouts(
        directory / "rollouts",
        2,
        batch.rollouts,
        decode=lambda ids: str(parts.tokenizer.decode(list(ids))),
        teacher_logprobs_N=batch.tokens.teacher_logprobs_N,
        weights=whole.weights,
    )
    saved = read_step(directory, 2, parts.run)
    assert saved.worst(5) == whole.worst(5)
    assert (saved.authors_N, saved.places_N, saved.ids) == (whole.authors_N, whole.places_N, whole.ids)
    torch.testing.assert_close(saved.ratio_N, whole.ratio_N, equal_nan=True)
    for name, weight_N in whole.weights.items():
        torch.testing.assert_close(saved.weights[name].float(), weight_N.float())


def test_what_the_student_did_not_write_is_not_ranked_by_a_log_probability_it_has_not(
    parts: Parts, batch: ScoredBatch, directory: Path
) -> None:
    save_batch(directory, STEP, batch)
    kept = read_step(directory, STEP, parts.run)
    assert Author.TEACHER in kept.authors_N
    assert all(kept.authors_N[n] is Author.STUDENT for n in kept.worst(10**6))


def test_a_step_that_was_not_kept_is_refused_with_those_that_were(
    parts: Parts, batch: ScoredBatch, directory: Path
) -> None:
    save_batch(directory, 7, batch)
    with pytest.raises(ConfigError, match="kept batches: 7; with saved rollouts: none"):
        read_step(directory, 3, parts.run)


def test_the_command_shows_terms_and_the_token_in_its_context(
    parts: Parts, batch: ScoredBatch, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = row_of_student(batch)
    save_batch(directory, STEP, changed(batch, row, -torch.inf))
    assert main(["inspect", str(directory), "--step", str(STEP), "--worst", "1"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "│ guidance │" in shown and "x = -inf" in shown and "by the student" in shown
