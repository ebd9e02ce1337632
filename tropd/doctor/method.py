"""Settings of a method that are known to go wrong."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from tropd.doctor.check import Check, ok, warning
from tropd.doctor.subject import Subject
from tropd.model.loading import choose_device, choose_dtype

_FEW_STEPS = 300
_SMALL_BETA = 0.01


def check_objections(subject: Subject) -> Iterator[Check]:
    for text in subject.run.method.objections(subject.run.sampling):
        yield warning("method", text, "")


def check_support(subject: Subject) -> Iterator[Check]:
    """Compare the top-k with the size of the vocabulary."""
    objective = subject.run.method.objective
    size = max(subject.student.tokenizer.get_vocab().values()) + 1
    for whose, top_k in (("teacher", objective.teacher_top_k), ("student", objective.student_top_k)):
        if top_k > size:
            yield warning(
                "top_k",
                f"the {whose}'s {top_k} likeliest tokens are asked for, but there are {size}: it is the whole "
                "vocabulary.",
                f"Set a top_k of at most {size}; 64 is the paper's.",
            )
        elif top_k:
            yield ok("top_k", f"the {whose}'s {top_k} likeliest of {size} tokens")


def check_dropout(subject: Subject) -> Iterator[Check]:
    """The student samples without dropout, so training with it trains another student."""
    lora = subject.run.student.lora
    if lora is not None and lora.dropout > 0:
        yield warning(
            "dropout",
            f"student.lora.dropout = {lora.dropout:g}: rollouts are drawn without it and trained with it, so the "
            "log-probabilities of sampler and trainer differ and every log-ratio is noisy.",
            "Set student.lora.dropout = 0.",
        )
        return
    config = subject.student.config.to_dict()
    named = {name: value for name, value in config.items() if "dropout" in name or name.endswith("pdrop")}
    active = [f"{name} = {value:g}" for name, value in named.items() if isinstance(value, int | float) and value > 0]
    unused = f" (the student's own, {', '.join(active)}, is switched off)" if active else ""
    yield ok("dropout", f"none{unused}: the student that samples is the student that is trained")


def check_precision(subject: Subject) -> Iterator[Check]:
    run = subject.run
    device = choose_device(run.device)
    dtype = choose_dtype(run.student.dtype, device)
    if dtype is torch.float16:
        yield warning(
            "precision",
            f"the student is trained in float16 on {device}: gradients below 6e-8 vanish and large logits overflow.",
            'Set student.dtype = "bfloat16" (or "float32").',
        )
        return
    masters = "" if dtype is torch.float32 else ", updated through float32 copies"
    yield ok("precision", f"the student in {str(dtype).removeprefix('torch.')} on {device}{masters}")


def check_guidance(subject: Subject) -> Iterator[Check]:
    """Adam divides by the gradient's size, so tiny gradients on long prefixes still move the weights."""
    run, wanted = subject.run, subject.run.rollout
    beta = getattr(run.method, "beta", None)
    if beta is None:
        return
    start = run.policy.shares(0.0, wanted.num_rollouts, wanted.max_new_tokens).prefix / wanted.max_new_tokens
    if run.steps < _FEW_STEPS and start > 0 and beta <= _SMALL_BETA:
        yield warning(
            "guidance",
            f"in {run.steps} steps that begin with prefixes of {start:.0%} of the answer and beta = {beta:g}, the "
            "first steps hold almost only the teacher's tokens with tiny gradients, which Adam rescales to full "
            "steps; little is left for the student's own tokens.",
            "At such short budgets set method.beta = 1 (docs/results.md: .33 became .81 after 40 steps), or train for "
            f"{_FEW_STEPS} steps and more.",
        )
