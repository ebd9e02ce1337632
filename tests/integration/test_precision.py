"""Half precision end to end, on a confident pair: every method trains, evaluates, resumes and exports."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.model.cases import rollouts_of, tokens_of, written
from tests.tiny import tiny_model
from tropd.config.run import Run
from tropd.data.graders import graded
from tropd.methods import METHODS
from tropd.methods.drafts import RolloutJob
from tropd.model.dense import dense_loss
from tropd.model.forward import Forward
from tropd.model.one_pass import can_fuse, fused_loss
from tropd.model.tiling import Tiling
from tropd.objective.context import Context
from tropd.objective.evidence import Needs
from tropd.rollout.stage import roll_out
from tropd.run.start import assemble, resume, train
from tropd.testbeds import embedded
from tropd.training.assembly import Parts
from tropd.training.scoring import score
from tropd.training.source import grade_of
from tropd.training.step import recall_needed, train_step
from tropd.types import READER

PAIR = embedded("nano-hard")
HALVES = ["bfloat16", "float16"]
READ = [name for name, cls in METHODS.items() if Needs.CHUNKS not in cls().needs]
"""A teacher that only writes has no weights to be halved: tests/servers/test_omniopd.py halves its student."""


def run_of(folder: Path, method: str, student: str, teacher: str, **changes: Any) -> Run:
    values: dict[str, Any] = {
        "student": {"path": PAIR.student, "dtype": student},
        "teacher": {"path": PAIR.teacher, "dtype": teacher},
        "method": {"name": method},
        "readers": {name: {} for name, r in METHODS[method]().readers.items() if name != READER and not r.made_of},
        "data": {"path": PAIR.prompts, **({"response_column": "answer"} if method == "sft" else {})},
        "rollout": {"num_prompts": 4, "num_rollouts": 1, "max_new_tokens": 28},
        "optimizer": {"learning_rate": 1e-3},
        "evaluation": {"data": {"path": PAIR.held_out, "limit": 2}, "max_new_tokens": 28, "num_samples": 1},
        "grader": PAIR.grader,
        "steps": 2,
        "output": str(folder / "run"),
        "checkpoint": {"every": 1, "keep": 9},
    }
    return Run.from_dict({**values, **changes}, "a run in half precision")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "records.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize("dtype", HALVES)
def test_every_method_trains_and_evaluates(tmp_path: Path, method: str, dtype: str) -> None:
    train(run_of(tmp_path, method, dtype, dtype, steps=1))
    (record,) = [r for r in records(tmp_path) if "loss" in r]
    assert torch.tensor([record["loss"], record["gradient_norm"]]).isfinite().all()
    assert record["gradient_norm"] > 0


MIXED = [pair for pair in itertools.product(["float32", *HALVES], repeat=2) if pair != ("float32", "float32")]


@pytest.mark.parametrize("student, teacher", MIXED)
@pytest.mark.parametrize("method", ["tropd", "opd", "gkd"])
def test_a_run_in_any_precisions_resumes_to_the_bit_and_exports(
    tmp_path: Path, method: str, student: str, teacher: str
) -> None:
    run = run_of(tmp_path, method, student, teacher, evaluation={})
    train(run)
    whole = weights(tmp_path / "run" / "model")
    assert {x.dtype for x in whole.values()} == {getattr(torch, student)}
    assert all(bool(x.isfinite().all()) for x in whole.values())
    resume(tmp_path / "run", step=1)
    again = weights(tmp_path / "run" / "model")
    assert all(torch.equal(x, again[name]) for name, x in whole.items())


def weights(model: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(model / "model.safetensors")


@pytest.mark.parametrize("method", READ)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_teacher_that_is_the_student_gives_no_signal_and_no_log_probability_is_above_0(
    tmp_path: Path, method: str, dtype: str
) -> None:
    run = run_of(tmp_path, method, dtype, dtype)
    run = dataclasses.replace(run, teacher=dataclasses.replace(run.teacher, path=str(PAIR.student)))
    parts = assemble(run, tmp_path)
    objective, batch = run.method.objective, scored(parts)
    tokens = batch.tokens
    for name in ("teacher_logprobs_N", "student_logprobs_N", "teacher_topk_logprobs_NK", "teacher_full_logprobs_NV"):
        if (given := tokens.peek(name)) is not None:
            assert float(given.max()) <= 0.0, name
    seen = []
    train_step(batch, objective, parts.learner, Context(progress=0.5), tokens_per_micro_batch=8192, watch=seen.append)
    for judged in seen:
        assert bool((judged.view.logprobs_N <= 0.0).all())
        if Needs.SAMPLED in objective.needs:
            gap_N = judged.tokens.teacher_logprobs_N - judged.view.logprobs_N
            assert bool((gap_N.abs() < 1e-3).all())


def scored(parts: Parts) -> Any:
    run = parts.run
    job = RolloutJob(
        prompts=parts.stream.next(4),
        num_rollouts=1,
        max_new_tokens=28,
        sampling=run.sampling,
        stop_ids=parts.stop_ids,
        seed=3,
        progress=0.9,
        grade=grade_of(parts),
    )
    rollouts = roll_out(run.policy, job, parts.engine, parts.writer, parts.pair)
    assert parts.grader is not None
    rollouts = graded(parts.grader, rollouts, parts.tokenizer)
    recall = recall_needed(run.method.objective, 1)
    return score(rollouts, run.method.objective, parts.readers, parts.learner, seed=0, recall=recall)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "gpt2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_confident_model_of_each_family_is_read_exactly_and_gets_the_gradient_of_float32(
    family: str, tied: bool, checkpointing: bool
) -> None:
    """Log-probabilities against float64, from the model's own states; the gradient of the head against float32."""
    model = tiny_model(family, tied=tied).bfloat16()
    rescale(model, 25.0)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    forward, rollouts = Forward(model, tiling=Tiling(tile_tokens=8)), rollouts_of()
    measured = forward.measure(rollouts, Needs.STUDENT_ENTROPY, top_k=4)
    head, ids_N = forward.head, tokens_of(rollouts).token_ids_N
    with torch.no_grad():
        hidden_NH = forward.hidden(rollouts)
        exact_NV = head.transform(hidden_NH.double() @ head.weight_VH.double().t()).log_softmax(-1)
    assert float(exact_NV.exp().amax(-1).median()) > (0.5 if family != "gemma2" else 0.05)
    assert float(measured.logprobs_N.max()) <= 0.0
    assert float((measured.logprobs_N - written(rollouts, exact_NV)).abs().mean()) < 2e-3
    assert measured.topk_logprobs_NK is not None and float(measured.topk_logprobs_NK.max()) <= 0.0
    weight_VH = head.weight_VH.detach().double().requires_grad_()
    logprobs_NV = head.transform(hidden_NH.double() @ weight_VH.t()).log_softmax(-1)
    (expected_VH,) = torch.autograd.grad(logprobs_NV.gather(1, ids_N[:, None]).sum(), weight_VH)

    def judge(rows: slice, logprobs_CM: torch.Tensor) -> torch.Tensor:
        whole = logprobs_CM.shape[1] > 1
        return (logprobs_CM.gather(1, ids_N[rows, None]) if whole else logprobs_CM).sum()

    hidden_NH.requires_grad_()
    if can_fuse(head):
        loss = fused_loss(head, hidden_NH, ids_N[:, None], judge, 8)
    else:
        loss = dense_loss(head, hidden_NH, ids_N, judge, 8)
    (found_VH,) = torch.autograd.grad(loss, head.weight_VH)
    assert float((found_VH.double() - expected_VH).norm() / expected_VH.norm()) < 1e-2
    forward.view(rollouts, tokens_of(rollouts), Needs.SAMPLED).logprobs_N.sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


def rescale(model: Any, largest: float) -> None:
    """Scale the head so that the median row's largest logit is this far above the mean."""
    forward = Forward(model)
    with torch.no_grad():
        logits_NV = forward.head.module(forward.hidden(rollouts_of())).float()
        model.get_output_embeddings().weight.mul_(largest / float((logits_NV.amax(-1) - logits_NV.mean(-1)).median()))
