"""The example of a teacher of your own keeps every promise, says what a mixture says, and teaches."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.cases import plain
from tests.tiny import VOCAB, tiny_model
from tropd.config.models import ServerConfig
from tropd.config.stages import OptimizerConfig
from tropd.errors import ConfigError, EvidenceError
from tropd.methods import METHODS, TrOPD
from tropd.model.optimizer import Optimizer
from tropd.objective.context import Context
from tropd.objective.evidence import OF_MODEL, Needs
from tropd.servers.dialects import dialect_of
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.testing import check_teacher, some_rollouts
from tropd.training.asked import check_evidence
from tropd.training.learner import ModelLearner
from tropd.training.scoring import score
from tropd.training.step import recall_needed, train_step

SHARES = [0.8, 0.2]


def example() -> Any:
    path = Path(__file__).parents[2] / "examples" / "ensemble.py"
    spec = importlib.util.spec_from_file_location("ensemble", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def members() -> list[LocalTeacher]:
    return [LocalTeacher(tiny_model(seed=n, sharp=4.0), name=f"m{n}") for n in range(2)]


def ensemble(each: list[LocalTeacher]) -> Teacher:
    return example().Ensemble(each, SHARES)


def test_it_runs_and_is_likelier_than_its_members_are_on_average(capsys: pytest.CaptureFixture[str]) -> None:
    first, second, mixture = example().main().values()
    assert mixture > 0.7 * first + 0.3 * second
    assert "nats per token" in capsys.readouterr().out


def test_it_keeps_the_promises_of_a_teacher() -> None:
    check_teacher(ensemble(members()), vocab_size=VOCAB)


def test_it_says_what_the_mean_of_probabilities_says() -> None:
    each, rollouts = members(), some_rollouts(VOCAB)
    ids_TJ = [torch.arange(3).expand(len(r.response_ids), 3) for r in rollouts]
    needs = Needs.SAMPLED | Needs.TOPK | Needs.STUDENT_TOPK | Needs.FULL | Needs.TEACHER_ENTROPY
    request = ScoreRequest(rollouts, needs, top_k=6, student_topk_ids_TJ=ids_TJ)
    for rollout, said in zip(rollouts, ensemble(each).score(request), strict=True):
        with torch.no_grad():
            both_TV = [plain(teacher.forward.model, [rollout]).exp() for teacher in each]
        full_TV = sum(share * p_TV for share, p_TV in zip(SHARES, both_TV, strict=True)).log()
        written_T = full_TV.gather(1, torch.tensor(rollout.response_ids, dtype=torch.int64)[:, None])[:, 0]
        assert said.full_logprobs_TV is not None and said.teacher == "m0 + m1"
        torch.testing.assert_close(said.full_logprobs_TV, full_TV, rtol=0, atol=1e-4)
        torch.testing.assert_close(said.logprobs_T, written_T, rtol=0, atol=1e-4)
        torch.testing.assert_close(said.topk_logprobs_TK, full_TV.topk(6).values, rtol=0, atol=1e-4)
        torch.testing.assert_close(said.at_student_topk_TJ, full_TV[:, :3], rtol=0, atol=1e-4)


def test_what_cannot_be_mixed_is_not_offered_and_refused() -> None:
    mixture = ensemble(members())
    assert OF_MODEL & ~mixture.capabilities == Needs.HIDDEN | Needs.REVERSE_KL | Needs.LOOKAHEAD
    with pytest.raises(EvidenceError, match=r"HIDDEN was asked of teacher m0 \+ m1"):
        mixture.score(ScoreRequest(some_rollouts(VOCAB), Needs.HIDDEN))
    served = members()
    served[1].capabilities = dialect_of(ServerConfig()).capabilities
    without = ensemble(served)
    assert without.capabilities == Needs.SAMPLED  # which tokens are likeliest in the mean, no top-k can tell
    with pytest.raises(EvidenceError, match="needs TOPK from the teacher, which offers SAMPLED"):
        check_evidence(TrOPD().objective, without, "tropd", grader=False)
    with pytest.raises(ConfigError, match="summing to 1"):
        example().Ensemble(members(), [0.5, 0.6])


@pytest.mark.parametrize("name", ["tropd", "eopd", "many_faces"])
def test_a_student_takes_a_step_towards_it(name: str) -> None:
    teacher, student, objective = ensemble(members()), tiny_model(seed=5, sharp=4.0), METHODS[name]().objective
    check_evidence(objective, teacher, name, grader=True)
    optimizer = Optimizer(student, OptimizerConfig(learning_rate=1e-4), total_steps=9)
    learner = ModelLearner(student, optimizer, vocab_size=VOCAB)
    rollouts = some_rollouts(VOCAB)
    batch = score(rollouts, objective, teacher, learner, seed=0, recall=recall_needed(objective, 1))
    sums = train_step(batch, objective, learner, Context(), tokens_per_micro_batch=64, teacher=teacher)
    assert 0 < sums.gradient_norms[0] < float("inf")
