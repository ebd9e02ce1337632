"""What a run will cost: memory, counted before anything is loaded, and disk for its checkpoints.

Parameters are counted on a model without storage (torch's meta device), so a model that would not fit is found without
loading it.  The activations that a layer keeps for its gradient are counted as for Qwen3: two norms, queries, keys,
values, the attention's result, and four times the width of the MLP.  Measured peaks of the resident set on a CPU agree
with this (docs/performance.md).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tropd.briefings.follow import Follow
from tropd.checkpoints.run_folder import check_place
from tropd.config.models import ModelConfig
from tropd.config.run import Run
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.subject import Subject
from tropd.errors import ConfigError, TropdError
from tropd.methods.horizon import horizons
from tropd.model.head import causal_lm_of
from tropd.model.loading import choose_device, choose_dtype, free_memory, wrap_student
from tropd.objective.evidence import Needs
from tropd.teachers.loading import shares_model

CURE = (
    "Use a smaller teacher, a [student.lora] section, student.gradient_checkpointing = true, a smaller "
    "tokens_per_micro_batch or rollout.max_batch, or bfloat16."
)
_TILES = {"one token": 1, "whole": 14, "part": 2}
"""Float32 tiles of logits at the same time, for terms that read single tokens or whole distributions: measured; and for
each reader of whom others are made: its distribution, and a copy beside the others."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes, by purpose."""

    student: int
    teacher: int
    """All weights in this process."""
    gradients: int
    moments: int
    """AdamW's two moments, in float32."""
    masters: int
    """float32 copies of half-precision parameters."""
    logits: int
    activations: int
    keys_and_values: int
    emptied: int = 0
    """Of the student, while it is trained in parts."""
    following: int = 0
    """Of the teacher, for those that follow the student."""

    @property
    def weights(self) -> int:
        return self.student + self.teacher

    @property
    def train(self) -> int:
        held = self.weights - self.emptied + self.gradients + self.moments + self.masters
        return held + max(self.logits + self.activations, self.masters)  # an update makes gradients in float32

    @property
    def peak(self) -> int:
        """The larger of writing and training, which take turns; moments and masters stay."""
        write = self.weights + self.moments + self.masters + self.keys_and_values
        return max(self.train, write)


def need_of(subject: Subject, device: torch.device | None = None, processes: int = 1) -> Need:
    """The need of each process, with nothing sharded; `device` if it is not this machine's."""
    run = subject.run
    device = device or choose_device(run.device)
    student = wrap_student(without_storage(run.student), run.student, run.seed)
    width = choose_dtype(run.student.dtype, device).itemsize
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    local = {name: one for name, one in run.all_teachers.items() if one.is_model and not one.servers}
    widths = {name: choose_dtype(one.dtype, device).itemsize for name, one in local.items()}
    readers = [x for x in run.all_readers.values() if x.made_of is None and not shares_model(run, x)]
    reading = [x for x in readers if x.is_model and not x.servers and not x.follows]
    new = max(horizons(run.policy, run.rollout.max_new_tokens, run.steps))
    longest = max((len(prompt.token_ids) for prompt in subject.prompts), default=0) + new
    told = max((len(ids) for p in subject.prompts for ids in p.told.values()), default=0) + new
    rollouts = -(-run.rollout.num_prompts * run.rollout.num_rollouts // processes)
    batch = min(run.rollout.max_batch, rollouts)
    own, theirs = [] if run.rollout.servers else [batch * longest * cached(subject.student.config, width)], [0]
    if run.policy.needs_teacher_text or run.policy.writes_jointly:  # None is the base, as large as the student
        here = {
            name: side or subject.student for name, side in subject.teachers.items() if side is None or name in local
        }
        length = batch * max(longest, told)
        theirs += [length * cached(side.config, widths.get(name, width)) for name, side in here.items()]
    copies = trained * (4 if run.student.lora else width)
    following = [
        copies + (trained * 4 if width < 4 and rule.averages and not run.student.lora else 0)
        for rule in rules_of(run).values()
    ]
    others = {name: one for name, one in local.items() if not one.follows}
    return Need(
        student=sum(p.numel() for p in student.parameters()) * width,
        teacher=sum(parameters_of(one) * widths[name] for name, one in others.items())
        + sum(parameters_of(one) * choose_dtype(one.dtype, device).itemsize for one in reading)
        + sum(following),
        gradients=trained * width,
        moments=trained * 8,
        masters=trained * 4 if width < 4 else 0,
        logits=_logits(subject, student, width),
        activations=_activations(subject, min(run.tokens_per_micro_batch, rollouts * longest), width),
        keys_and_values=sum([*own, max(theirs)]) if run.policy.writes_jointly else max([*own, *theirs]),
        following=sum(following),
    )


def rules_of(run: Run) -> dict[str, Follow]:
    """The rules of the teachers and readers that follow the student, by name."""
    readers = {name: one for name, one in run.all_readers.items() if not shares_model(run, one)}
    return {name: one.follow for name, one in [*run.all_teachers.items(), *readers.items()] if one.follows}


def following_said(run: Run, need: Need) -> list[str]:
    """A sentence on the teachers that follow the student, if there are any."""
    rules = rules_of(run)
    if not rules:
        return []
    who = ", ".join(f"{name} ({rule.rule})" for name, rule in rules.items()).replace("default (", "the teacher (")
    averaged = run.student.lora is None and any(rule.averages for rule in rules.values())
    average = ", with an average in float32 where the model is in half precision" if averaged else ""
    what = "the adapter" if run.student.lora else "the model"
    return [f"{who}: follows the student. Each holds {what} a second time{average}: {gib(need.following)} in all."]


def parameters_of(config: ModelConfig) -> int:
    return sum(p.numel() for p in without_storage(config).parameters())


def cached(config: Any, width: int) -> int:
    """Bytes of keys and values per token."""
    return 2 * width * int(config.num_hidden_layers) * _attention(config)[1]


def _attention(config: Any) -> tuple[int, int]:
    """Sizes of a token's queries and keys."""
    heads = int(config.num_attention_heads)
    size = getattr(config, "head_dim", None) or int(config.hidden_size) // heads
    return heads * size, (getattr(config, "num_key_value_heads", None) or heads) * size


def _activations(subject: Subject, tokens: int, width: int) -> int:
    """Bytes of activations that are kept for these tokens from forward to backward."""
    config, student = subject.student.config, subject.run.student
    hidden, (queries, keys) = int(config.hidden_size), _attention(config)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        inner = experts * (getattr(config, "moe_intermediate_size", None) or inner)
    normed = 2 * hidden + queries + keys  # what passes a norm is kept in float32, scaled, and as it leaves
    layer = normed * (4 + width * (1 if student.lora else 2)) + (queries + keys + 4 * inner) * width
    layers = int(config.num_hidden_layers)
    return tokens * (layers * hidden * width + layer if student.gradient_checkpointing else layers * layer)


def _logits(subject: Subject, student: Any, width: int) -> int:
    """Bytes of the tiles of logits, and of a trained head's gradient, which is summed in float32."""
    run = subject.run
    size = max(subject.student.tokenizer.get_vocab().values()) + 1
    head = causal_lm_of(student).get_output_embeddings()
    gradient = sum(p.numel() for p in head.parameters() if p.requires_grad) * 4
    wide = run.tile_tokens * size * 4
    made = len({part for x in run.all_readers.values() if x.made_of for part in x.made_of.readers})
    if Needs.FULL in run.method.needs:
        return wide * (_TILES["whole"] + _TILES["part"] * made) + gradient
    tile = run.tile_tokens * min(size, run.tile_vocab or size)
    alone = tile * (width + (4 if width < 4 else 0)) * _TILES["one token"] + gradient
    return max(alone, wide * (_TILES["part"] * made + 2)) if made else alone


def check_memory(subject: Subject) -> Iterator[Check]:
    """An error if not even the weights fit; a warning if a step probably will not fit."""
    try:
        need = need_of(subject)
    except TropdError as refusal:  # an adapter that does not fit, a device that is not there
        yield error("memory", str(refusal))
        return
    except (AttributeError, RuntimeError, NotImplementedError, ValueError) as failure:
        yield ok("memory", f"not estimated for this family ({type(failure).__name__}: {failure})")
        return
    device = choose_device(subject.run.device)
    free = free_memory(device)
    parts = {
        "student": need.student,
        "teacher": need.teacher,
        "gradients": need.gradients,
        "AdamW": need.moments + need.masters,
        "logits": need.logits,
        "activations": need.activations,
        "keys and values": need.keys_and_values,
    }
    for sentence in following_said(subject.run, need):
        yield ok("teacher", sentence)
    said = f"about {gib(need.peak)} at the peak ({', '.join(f'{k} {gib(v)}' for k, v in parts.items() if v)})"
    if free is None:
        yield ok("memory", f"{said}; how much {device} has free is not known")
        return
    said += f", {gib(free)} free on {device}"
    if need.weights > free:
        yield error("memory", f"{said}: not even the weights fit.", CURE)
    elif need.peak > free:
        yield warning("memory", f"{said}: a step will probably not fit.", CURE)
    else:
        yield ok("memory", said)


def check_disk(subject: Subject) -> Iterator[Check]:
    """Room for the kept checkpoints, the best one, the one being written, and the finished model."""
    run = subject.run
    directory = Path(run.output)
    try:
        check_place(run, directory)
    except ConfigError as refused:
        yield error("output", str(refused), "Set output to a new folder.")
    try:
        need = need_of(subject)
    except (TropdError, AttributeError, RuntimeError, NotImplementedError, ValueError):
        return  # check_memory has said so
    there = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    # what is trained has as many bytes as its gradients
    each = need.gradients + need.moments + need.masters + need.following
    total = each * (run.checkpoint.keep + 2) + (need.gradients if run.student.lora else need.student)
    free = shutil.disk_usage(there).free
    said = f"checkpoints of {gib(each)} each, {gib(total)} in all; {gib(free)} free at {there.absolute()}"
    if total > free:
        yield warning("disk", said, "Lower checkpoint.keep, free the disk, or set output to another one.")
    else:
        yield ok("disk", said)


def gib(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def without_storage(config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    extra: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    extra |= {"gguf_file": config.gguf_file} if config.gguf_file else {}
    found = AutoConfig.from_pretrained(config.path, **options, **extra)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(found, **options)
    model.tie_weights()  # transformers 5.0 leaves that out where there is no storage
    return model
