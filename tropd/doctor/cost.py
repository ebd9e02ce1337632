"""What a run will take: memory before anything is loaded, disk for its checkpoints.

Parameters are counted on a model without storage (torch's meta device), so a model that would not fit is found out
without loading it.  Activations are estimated as 34 bytes per token, layer and hidden unit in half precision
(Korthikanti et al., arXiv:2205.05198, without the attention matrix), twice that in float32.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tropd.config import ModelConfig
from tropd.doctor.check import Check, error, ok, warning
from tropd.doctor.subject import Subject
from tropd.errors import TropdError
from tropd.objective.evidence import Needs
from tropd.student.models import choose_device, choose_dtype, wrap_student

_ACTIVATION_BYTES = 34
_TILES = 3  # logits, their log-softmax and its gradient


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes, by what they are for."""

    student: int
    teacher: int
    """Of all in this process."""
    gradients: int
    moments: int
    """AdamW's two, in float32."""
    masters: int
    """float32 copies of half-precision parameters."""
    logits: int
    activations: int
    keys_and_values: int

    @property
    def weights(self) -> int:
        return self.student + self.teacher

    @property
    def train(self) -> int:
        return self.weights + self.gradients + self.moments + self.masters + self.logits + self.activations

    @property
    def peak(self) -> int:
        """Writing and training take turns; moments and masters stay."""
        write = self.weights + self.moments + self.masters + self.keys_and_values
        return max(self.train, write)


def need_of(subject: Subject) -> Need:
    run = subject.run
    device = choose_device(run.device)
    student = wrap_student(_without_storage(run.student), run.student, run.seed)
    width = choose_dtype(run.student.dtype, device).itemsize
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    teacher = 0
    for config in run.all_teachers.values():
        if config.path != "base" and not config.servers:
            numel = sum(p.numel() for p in _without_storage(config).parameters())
            teacher += numel * choose_dtype(config.dtype, device).itemsize
    config = subject.student.config
    layers, hidden = int(config.num_hidden_layers), int(config.hidden_size)
    size = max(subject.student.tokenizer.get_vocab().values()) + 1
    rows = run.tile_tokens
    if Needs.FULL in run.method.needs:  # both whole distributions of a micro-batch
        rows += run.tokens_per_micro_batch
    per_layer = _ACTIVATION_BYTES * width // 2
    tokens = run.tokens_per_micro_batch
    kept = tokens * hidden * (layers * width + per_layer if run.student.gradient_checkpointing else layers * per_layer)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    longest = max((len(prompt.token_ids) for prompt in subject.prompts), default=0) + run.rollout.max_new_tokens
    batch = min(run.rollout.max_batch, run.rollout.num_prompts * run.rollout.num_rollouts)
    return Need(
        student=sum(p.numel() for p in student.parameters()) * width,
        teacher=teacher,
        gradients=sum(trained) * width,
        moments=sum(trained) * 8,
        masters=sum(trained) * 4 if width < 4 else 0,
        logits=rows * size * 4 * _TILES,
        activations=kept,
        keys_and_values=2 * batch * longest * layers * int(heads) * int(head) * width,
    )


def check_memory(subject: Subject) -> Iterator[Check]:
    """Refuses when not even the weights fit; warns when a step probably will not."""
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
    said = f"about {gib(need.peak)} at the peak ({', '.join(f'{k} {gib(v)}' for k, v in parts.items() if v)})"
    if free is None:
        yield ok("memory", f"{said}; how much {device} has free is not known")
        return
    said += f", {gib(free)} free on {device}"
    cure = (
        "Use a smaller teacher, a [student.lora] section, student.gradient_checkpointing = true, a smaller "
        "tokens_per_micro_batch or rollout.max_batch, or bfloat16."
    )
    if need.weights > free:
        yield error("memory", f"{said}: not even the weights fit.", cure)
    elif need.peak > free:
        yield warning("memory", f"{said}: a step will probably not fit.", cure)
    else:
        yield ok("memory", said)


def check_disk(subject: Subject) -> Iterator[Check]:
    """Checkpoints that are kept, the best one, the one being written, and the finished model."""
    run = subject.run
    directory = Path(run.output)
    if (directory / "run.toml").exists():
        yield error(
            "output", f"{directory} holds a run already.", f"Go on with `tropd resume {directory}`, or set output."
        )
    try:
        need = need_of(subject)
    except (TropdError, AttributeError, RuntimeError, NotImplementedError, ValueError):
        return  # check_memory has said so
    there = next(path for path in [directory, *directory.absolute().parents] if path.exists())
    # what is trained has as many bytes as its gradients
    each = need.gradients + need.moments + need.masters
    total = each * (run.checkpoint.keep + 2) + (need.gradients if run.student.lora else need.student)
    free = shutil.disk_usage(there).free
    said = f"checkpoints of {gib(each)} each, {gib(total)} in all; {gib(free)} free at {there.absolute()}"
    if total > free:
        yield warning("disk", said, "Lower checkpoint.keep, free the disk, or set output to another one.")
    else:
        yield ok("disk", said)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, where the system says."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    facts = Path("/proc/meminfo")
    if device.type != "cpu" or not facts.exists():
        return None
    lines = dict(line.split(":", 1) for line in facts.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def gib(num_bytes: int) -> str:
    if num_bytes < 2**20:
        return f"{num_bytes / 2**10:.0f} KiB"
    return f"{num_bytes / 2**20:.0f} MiB" if num_bytes < 2**30 else f"{num_bytes / 2**30:.1f} GiB"


def _without_storage(config: ModelConfig) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": config.trust_remote_code}
    extra: dict[str, Any] = {"revision": config.revision} if config.revision else {}
    extra |= {"gguf_file": config.gguf_file} if config.gguf_file else {}
    found = AutoConfig.from_pretrained(config.path, **options, **extra)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(found, **options)
