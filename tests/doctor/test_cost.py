"""Memory is counted as real models use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.small_runs import run_of, save_model, write_rows
from tests.tiny import VOCAB
from tropd.doctor.cost import check_memory, gib, need_of
from tropd.doctor.subject import Subject, read_subject
from tropd.model.loading import load_model, wrap_student
from tropd.training.assembly import load_parts

TOKENS = 96


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough that what is kept per head and per token, whatever the width, does not count."""
    world = tmp_path_factory.mktemp("world")
    wide = {"width": 128, "layers": 3, "intermediate_size": 320, "max_position_embeddings": 512}
    for name in ("student", "teacher"):
        save_model(world / name, sharp=1.0, tied=False, **wide)
    write_rows(world / "prompts.jsonl", [{"prompt": "1" * 40, "answer": "2"}])
    return world


def subject_of(world: Path, folder: Path, **changes: Any) -> Subject:
    data = {"path": str(world / "prompts.jsonl")}
    run = run_of(world, data=data, tokens_per_micro_batch=TOKENS, **changes)
    subject, _ = read_subject(run)
    assert subject is not None
    return subject


@pytest.mark.parametrize(("dtype", "lora"), [("float32", False), ("bfloat16", False), ("float32", True)])
def test_activations_are_what_layers_keep_for_their_gradient(
    world: Path, tmp_path: Path, dtype: str, lora: bool
) -> None:
    adapter = {"lora": {"rank": 2}} if lora else {}
    subject = subject_of(world, tmp_path, student={"path": str(world / "student"), "dtype": dtype, **adapter})
    model = wrap_student(load_model(subject.run.student, "student", torch.device("cpu")), subject.run.student, 0)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    inside = model.get_base_model() if lora else model  # type: ignore[operator]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        inside.model(input_ids=torch.ones(1, TOKENS, dtype=torch.int64), use_cache=False)  # type: ignore[operator]
    measured = sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)
    assert need_of(subject).activations == pytest.approx(measured, rel=0.12)


def test_the_precision_is_that_of_the_device_in_question(world: Path, tmp_path: Path) -> None:
    subject = subject_of(world, tmp_path)
    here, there = (need_of(subject, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert there.student * 2 == here.student and there.masters == 2 * there.student and here.masters == 0


def test_small_batches_and_tiled_vocabularies_need_less(world: Path, tmp_path: Path) -> None:
    whole = need_of(subject_of(world, tmp_path))
    rollout = {"num_prompts": 1, "num_rollouts": 1, "max_new_tokens": 8}
    subject = subject_of(world, tmp_path, rollout=rollout)
    tokens = len(subject.prompts[0].token_ids) + 8
    assert tokens < TOKENS and need_of(subject).activations == pytest.approx(whole.activations * tokens / TOKENS)
    gradient = VOCAB * 128 * 4
    tiled = need_of(subject_of(world, tmp_path, tile_vocab=VOCAB // 2))
    assert tiled.logits - gradient == pytest.approx((whole.logits - gradient) / 2, rel=0.01)


def test_the_teachers_texts_need_its_keys_and_values_and_servers_have_their_own(world: Path, tmp_path: Path) -> None:
    tropd, opd = (need_of(subject_of(world, tmp_path, method={"name": name})) for name in ("tropd", "opd"))
    assert tropd.keys_and_values == opd.keys_and_values > 0  # models of one size
    away = {"servers": ["http://127.0.0.1:1"]}
    assert need_of(subject_of(world, tmp_path, method={"name": "opd"}, rollout=away)).keys_and_values == 0
    assert need_of(subject_of(world, tmp_path, method={"name": "tropd"}, rollout=away)).keys_and_values > 0
    together = need_of(subject_of(world, tmp_path, method={"name": "skd"}))
    assert together.keys_and_values == 2 * opd.keys_and_values, "both write at the same time"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", ["ema", "copy"])
def test_a_teacher_that_follows_is_counted_as_it_is_held(world: Path, tmp_path: Path, dtype: str, rule: str) -> None:
    for lora in ({}, {"lora": {"rank": 2}}):
        student = {"path": str(world / "student"), "dtype": dtype, **lora}
        teacher = {"path": "start", "follow": {"rule": rule}}
        subject = subject_of(world, tmp_path, student=student, teacher=teacher, method={"name": "opd"})
        parts = load_parts(subject.run, tmp_path)
        (follower,) = parts.followers
        weights = () if lora else follower.teacher.forward.model.parameters()
        held = {x.data_ptr(): x.nbytes for x in (*weights, *follower.held().values())}
        need = need_of(subject)
        assert need.teacher == need.following == sum(held.values())
        said = [str(check) for check in check_memory(subject) if "follows the student" in str(check)]
        assert len(said) == 1 and gib(need.following) in said[0] and ("adapter" in said[0]) == bool(lora)
