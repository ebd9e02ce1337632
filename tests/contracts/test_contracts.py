"""Our teachers and engines keep the promises of `tropd.testing`, and a broken promise is noticed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.servers.mini import MiniServer
from tests.small_runs import save_model
from tests.tiny import VOCAB, tiny_model
from tropd.config.models import ServerConfig
from tropd.config.stages import OptimizerConfig
from tropd.data.graders import GRADERS
from tropd.errors import EvidenceError
from tropd.model.optimizer import Optimizer
from tropd.objective.evidence import Needs
from tropd.rollout.transformers import TransformersEngine
from tropd.teachers.cached import Cached
from tropd.teachers.local import LocalTeacher
from tropd.teachers.meeting import canary_of
from tropd.teachers.routed import Routed
from tropd.teachers.server import ServerTeacher
from tropd.teachers.teacher import ScoreRequest, Teacher
from tropd.testing import check_engine, check_grader, check_teacher, some_rollouts
from tropd.training.learner import ModelLearner
from tropd.types import Completion, Request, TeacherScores


def test_a_local_teacher_and_its_wrappers_keep_their_promises(tmp_path: Path) -> None:
    teacher = LocalTeacher(tiny_model(sharp=4.0))
    check_teacher(teacher, vocab_size=VOCAB)
    check_teacher(Routed({"default": teacher}), vocab_size=VOCAB)
    check_teacher(Cached(teacher, tmp_path / "scores.sqlite", "tiny"), vocab_size=VOCAB)


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_teacher_on_a_server_keeps_its_promises(tmp_path: Path, kind: Any) -> None:
    folder = save_model(tmp_path / "teacher", tiny_model(sharp=4.0))
    with MiniServer(folder) as server:
        settings = ServerConfig(kind=kind, deadline_seconds=5.0)
        teacher = ServerTeacher([server.url], settings, vocab_size=VOCAB, canary=canary_of([], VOCAB))
        check_teacher(teacher, vocab_size=VOCAB)


def test_the_engine_of_transformers_keeps_its_promises() -> None:
    check_engine(TransformersEngine(tiny_model(sharp=4.0), max_batch=3), vocab_size=VOCAB)


class Shifted(LocalTeacher):
    """Scores the token before."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        return [replace(s, logprobs_T=s.logprobs_T.roll(1)) for s in super().score(request)]


class Sorted(LocalTeacher):
    """Answers in the order of lengths."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        return sorted(super().score(request), key=lambda s: len(s.logprobs_T))


@pytest.mark.parametrize(
    ("kind", "promise"), [(Shifted, "same log-probability there|likelier than"), (Sorted, "one log-probability per")]
)
def test_a_teacher_that_breaks_a_promise_is_told_which(kind: type[LocalTeacher], promise: str) -> None:
    with pytest.raises(AssertionError, match=promise):
        check_teacher(kind(tiny_model(sharp=4.0)), vocab_size=VOCAB, top_k=VOCAB)


class Boastful(Teacher):
    """Offers what only a model in this process can give."""

    capabilities = Needs.SAMPLED | Needs.REVERSE_KL


def test_a_teacher_without_a_forward_pass_cannot_offer_the_reverse_kl() -> None:
    with pytest.raises(AssertionError, match="REVERSE_KL and HIDDEN come with a `forward`"):
        check_teacher(Boastful(), vocab_size=VOCAB)
    learner = ModelLearner(model := tiny_model(), Optimizer(model, OptimizerConfig(), 1), vocab_size=VOCAB)
    rollouts = some_rollouts(VOCAB)
    with pytest.raises(EvidenceError, match="teacher default was asked for, but the teacher has no forward pass"):
        learner.reverse_kl(rollouts, Boastful(), rollouts)


class Unsure(LocalTeacher):
    """Gives whole distributions of a flatter model than the one that scores the written tokens."""

    def score(self, request: ScoreRequest) -> list[TeacherScores]:
        return [
            s if s.full_logprobs_TV is None else replace(s, full_logprobs_TV=(0.5 * s.full_logprobs_TV).log_softmax(-1))
            for s in super().score(request)
        ]


def test_whole_distributions_of_another_model_are_noticed() -> None:
    with pytest.raises(AssertionError, match="the distribution gives the written token its score"):
        check_teacher(Unsure(tiny_model(sharp=4.0)), vocab_size=VOCAB)


@pytest.mark.parametrize("name", ["exact", "numeric"])
def test_our_graders_keep_their_promises(name: str) -> None:
    check_grader(GRADERS[name], answers=["4", "9", "25"], right=["4", "9", "25"], wrong=["5", "", "24"])


def longer_is_better(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


def larger_batches_are_better(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    return [float(len(text) + len(completions)) for text in completions]


@pytest.mark.parametrize(
    ("grader", "wrong", "promise"),
    [
        (longer_is_better, "a long wrong answer", "a right completion has a higher score than a wrong"),
        (larger_batches_are_better, "no", "a score does not depend on other completions"),
    ],
)
def test_a_grader_that_breaks_a_promise_is_told_which(grader: Any, wrong: str, promise: str) -> None:
    check_grader(longer_is_better, answers=["4", "9"], right=["four", "nine"], wrong=["no", "no"])
    with pytest.raises(AssertionError, match=promise):
        check_grader(grader, answers=["4", "9"], right=["four", "nine"], wrong=[wrong, wrong])


class Seedless(TransformersEngine):
    """Draws by a text's place in the batch."""

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return super().generate([replace(request, seed=n) for n, request in enumerate(requests)])


def test_an_engine_whose_texts_depend_on_their_neighbours_is_told_so() -> None:
    with pytest.raises(AssertionError, match="not on the order"):
        check_engine(Seedless(tiny_model(sharp=4.0)), vocab_size=VOCAB)
