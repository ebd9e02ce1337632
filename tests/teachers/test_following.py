"""A teacher that follows an adapted student is the student's model with another adapter, and nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.model.cases import rollouts_of
from tests.small_runs import run_of
from tests.tiny import tiny_model
from tests.told import COLUMN, write_world
from tropd.briefings.follow import Copy, Ema
from tropd.errors import CheckpointError, ConfigError
from tropd.objective.memory import Memory
from tropd.teachers.following import Follower
from tropd.teachers.local import LocalTeacher
from tropd.teachers.teacher import ScoreRequest
from tropd.training.assembly import Parts, load_parts

LORA = {"lora": {"rank": 4, "alpha": 8}}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"))


def parts_of(world: Path, folder: Path, **changes: Any) -> Parts:
    teacher = {"path": "start", "briefing": COLUMN, "follow": {"rule": "ema", "decay": 0.5}}
    data = {"path": str(world / "told.jsonl")}
    method = changes.pop("method", {"name": "opsd"})
    run = run_of(world, method, kind="quick", **{"teacher": teacher, "data": data, **changes})
    return load_parts(run, folder)


def perturb(tensors: dict[str, Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for x in tensors.values():
            x.add_(torch.randn(x.shape, generator=generator))


def num_bytes(tensors: Any) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def read(teacher: LocalTeacher) -> Tensor:
    return torch.cat([score.logprobs_T for score in teacher.score(ScoreRequest(rollouts_of()))])


def test_only_the_adapter_is_held_a_second_time(world: Path, tmp_path: Path) -> None:
    parts = parts_of(world, tmp_path, student=LORA)
    (follower,) = parts.followers
    assert parts.teacher.forward is not None and parts.teacher.forward.model is parts.model
    adapter = [p for p in parts.model.parameters() if p.requires_grad]
    assert num_bytes(follower.held().values()) == num_bytes(adapter) and follower.averages == {}
    assert num_bytes(adapter) < 0.25 * num_bytes(parts.model.parameters())


def test_the_student_is_itself_again_whatever_happens_while_the_teacher_reads(world: Path, tmp_path: Path) -> None:
    parts = parts_of(world, tmp_path, student=LORA)
    (follower,) = parts.followers
    perturb(follower.held())
    before = {name: (p, p.data_ptr(), p.detach().clone()) for name, p in parts.model.named_parameters()}
    first, own = read(follower.teacher), read(LocalTeacher(parts.model, within=lambda: torch.no_grad()))
    assert (first != own).any(), "another adapter was read"
    assert follower.swapped is not None
    with pytest.raises(RuntimeError, match="in the middle"), follower.swapped():
        raise RuntimeError("in the middle")
    for name, p in parts.model.named_parameters():
        same, place, values = before[name]
        assert p is same and p.data_ptr() == place and torch.equal(p, values)
    assert torch.equal(read(follower.teacher), first)


def test_the_students_gradient_is_the_same_if_the_teacher_reads_before_backward(world: Path, tmp_path: Path) -> None:
    parts = parts_of(world, tmp_path, student=LORA)
    (follower,) = parts.followers
    perturb(follower.held())
    trained = [p for p in parts.model.parameters() if p.requires_grad]

    def gradients(teacher_reads: bool) -> list[Tensor]:
        loss = parts.learner.forward.hidden(rollouts_of()).square().sum()
        if teacher_reads:
            read(follower.teacher)
        return list(torch.autograd.grad(loss, trained))

    assert all(torch.equal(a, b) for a, b in zip(gradients(False), gradients(True), strict=True))


def test_the_teacher_is_the_student_after_a_copy_and_moves_by_its_share_else(world: Path, tmp_path: Path) -> None:
    for student in ({}, LORA, {"dtype": "bfloat16"}):
        parts = parts_of(world, tmp_path, student=student)
        (follower,) = parts.followers
        masters = parts.learner.optimizer.masters
        perturb({name: x.data for name, x in masters.items()})
        before = {name: x.float().clone() for name, x in follower.held().items()}
        follower.after(0, masters, None, Memory())
        held = follower.held()
        assert all(torch.equal(x, before[n].lerp(masters[n].detach(), 0.5)) for n, x in held.items())
        copying = Follower("teacher", Copy(), follower.teacher, follower.swapped)
        copying.after(0, masters, None, Memory())
        assert all(torch.equal(x, masters[name].to(x.dtype)) for name, x in copying.held().items())


def test_an_average_in_half_precision_moves_where_half_precision_would_stand_still() -> None:
    follower = Follower("teacher", Ema(decay=0.999), LocalTeacher(tiny_model(layers=1).to(torch.bfloat16)))
    start = {name: x.float().clone() for name, x in follower.held().items()}
    target = {name: 1.5 * x for name, x in start.items()}
    for step in range(700):
        follower.after(step, target, None, Memory())
    for name, x in follower.teacher.forward.model.named_parameters():
        assert torch.equal(x, follower.averages[name].to(torch.bfloat16))
        torch.testing.assert_close(x.float(), 1.25 * start[name], rtol=0.01, atol=0, msg="half of the way")


def test_a_student_without_trained_weights_and_another_checkpoint_are_refused(world: Path, tmp_path: Path) -> None:
    parts = parts_of(world, tmp_path)
    (follower,) = parts.followers
    with pytest.raises(ConfigError, match="the student, but the student trains no weights. Leave teacher.follow out"):
        follower.check({})
    with pytest.raises(ConfigError, match="the student, which trains 1 tensors where the teacher has"):
        follower.check({"other": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"has no place in the checkpoint, .* belongs to another model"):
        follower.load_state_tensors({})


def test_a_teacher_that_moves_writes_its_texts_anew(world: Path, tmp_path: Path) -> None:
    prefix = {"name": "tropd", "top_k": 8, "prefix": {"shape": "constant", "start": 0.5}}
    for student in ({}, LORA):
        parts = parts_of(world, tmp_path / str(student), student=student, method=prefix)
        assert parts.writer is not None
        assert not list((tmp_path / str(student)).glob("*.sqlite")), "a kept text would be an older teacher's"
