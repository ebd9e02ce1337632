"""What a run will need on machines that are not at hand: memory per device, time per step, servers, bytes.

A phase takes the longer of its arithmetic and its traffic (the roofline of Williams et al. 2009) over the share of the
peak that real kernels reach:

    teacher scoring    2 P_T tokens
    training           6 P_S tokens; 8 with gradient checkpointing
    writing            2 P_S tokens, or P_S bytes and the cache read once per token of the longest answer

P are the parameters that a token meets: those of the layers always, the head's where a token is written, and those of
the input embedding, which is looked up, never.

Training on several devices also waits for its weights: gathered in every forward and backward pass, and the gradient
sent once (FSDP2), 3 P_S numbers a micro-batch.  The shares in REACHED are assumptions, not measurements of tropd on
these devices; docs/performance.md compares predictions with measured steps.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch

from tropd.config import Run
from tropd.doctor.cost import Need, need_of
from tropd.doctor.subject import read_subject
from tropd.errors import ConfigError
from tropd.student.models import choose_device, choose_dtype

REACHED = {"score": 0.5, "train": 0.35, "write": 0.5}
"""Share of a GPU's peak that each phase is taken to reach."""
REACHED_HERE = {"score": 0.7, "train": 0.65, "write": 1.0}
"""Of what products and copies reach on a CPU: measured by benchmarks/plan.py with one thread."""


@dataclass(frozen=True, kw_only=True)
class Device:
    name: str
    memory: float
    """Bytes."""
    operations: float
    """Per second, dense, in bfloat16 (float32 on a CPU)."""
    bandwidth: float
    """Bytes of memory per second."""
    link: float = float("inf")
    """Bytes per second and direction to the other devices of its machine."""
    reached: Mapping[str, float] = field(default_factory=lambda: REACHED)


# From the makers' data sheets: SXM modules, without sparsity.
DEVICES = {
    "a100": Device(name="a100", memory=80e9, operations=312e12, bandwidth=2.0e12, link=300e9),
    "h100": Device(name="h100", memory=80e9, operations=989e12, bandwidth=3.35e12, link=450e9),
    "h200": Device(name="h200", memory=141e9, operations=989e12, bandwidth=4.8e12, link=450e9),
    "l40s": Device(name="l40s", memory=48e9, operations=362e12, bandwidth=0.864e12, link=32e9),
    "rtx4090": Device(name="rtx4090", memory=24e9, operations=165e12, bandwidth=1.008e12, link=32e9),
}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run on a cluster; seconds are per step."""

    device: Device
    num_devices: int
    need: Need
    """Bytes on one device, with nothing sharded."""
    tokens: dict[str, float]
    """Per step: prompt, written by the student, trained on."""
    seconds: dict[str, float]
    steps: int
    score_bytes: float
    """Sent by a teacher server in a step."""
    gather_bytes: float
    """Received by each device in a step, to have whole layers."""

    @property
    def sharded(self) -> Need:
        """Bytes on each device when training state is sharded over all of them.  Whoever writes rollouts in process
        gathers the whole student, so its weights stay."""
        parts = ("gradients", "moments", "masters")
        return replace(self.need, **{name: ceil(getattr(self.need, name) / self.num_devices) for name in parts})

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def run_seconds(self) -> float:
        return self.step_seconds * self.steps

    @property
    def teacher_devices(self) -> int:
        """So many teachers score a batch in the time in which it is trained on."""
        return max(1, ceil(self.seconds["score"] / self.seconds["train"]))

    @property
    def writing_devices(self) -> int:
        return max(1, ceil(self.seconds["write"] / self.seconds["train"]))

    @property
    def fits(self) -> bool:
        return self.sharded.peak <= self.device.memory


def make_plan(run: Run, device: Device, num_devices: int = 1) -> Plan:
    """From the models' configurations and the prompts alone; no weights are read."""
    subject, refusals = read_subject(run)
    if subject is None or not subject.prompts:
        found = [str(check) for check in refusals] or ["there are no prompts"]
        raise ConfigError("a plan needs the models' configurations and the prompts: " + " ".join(found))
    need = need_of(subject)
    width = choose_dtype(run.student.dtype, choose_device(run.device)).itemsize
    num_rollouts = run.rollout.num_prompts * run.rollout.num_rollouts
    prompt = sum(len(p.token_ids) for p in subject.prompts) / len(subject.prompts)
    tokens = {
        "prompt": prompt * num_rollouts,
        "written": float(run.rollout.max_new_tokens * num_rollouts),
        "read": (prompt + run.rollout.max_new_tokens) * num_rollouts,
    }
    student = teacher = _met(subject.student.config, need.student / width)
    if subject.teacher is not None and need.teacher:
        width_T = choose_dtype(run.teacher.dtype, choose_device(run.device)).itemsize
        teacher = _met(subject.teacher.config, need.teacher / width_T)
    factor = (8 if run.student.gradient_checkpointing else 6) * run.optimizer.num_updates
    operations = {
        phase: factor * (layers * tokens["read"] + head * tokens["written"])
        for phase, factor, (layers, head) in (("write", 2, student), ("score", 2, teacher), ("train", factor, student))
    }
    passes = ceil(num_rollouts / run.rollout.max_batch / num_devices)
    micro_batches = ceil(tokens["read"] / num_devices / run.tokens_per_micro_batch) * run.optimizer.num_updates
    gathered = 3.0 * need.student * micro_batches * (1 - 1 / num_devices)
    traffic = {
        "write": passes * run.rollout.max_new_tokens * (sum(student) * width + need.keys_and_values / 2),
        "score": float(need.teacher or need.student),
        "train": float(3 * need.student + 2 * need.moments),
    }
    seconds = {
        phase: max(operations[phase] / device.operations / num_devices, traffic[phase] / device.bandwidth)
        / device.reached[phase]
        for phase in operations
    }
    seconds["train"] = max(seconds["train"], gathered / device.link)
    per_token = 8 + 12 * getattr(run.method, "top_k", 0)  # a log-probability, and ids with theirs
    return Plan(
        device=device,
        num_devices=num_devices,
        need=need,
        tokens=tokens,
        seconds=seconds,
        steps=run.steps,
        score_bytes=tokens["written"] * per_token,
        gather_bytes=gathered,
    )


def _met(config: Any, num_parameters: float) -> tuple[float, float]:
    """Parameters that a token meets in the layers, and in the output head."""
    config = config.get_text_config()
    head = float(config.vocab_size * config.hidden_size)
    return num_parameters - head * (1 if config.tie_word_embeddings else 2), head


def read_cluster(text: str) -> tuple[Device, int]:
    """`8xh100`, `h200`, or `here`: this machine, measured."""
    if text == "here":
        return measure_here(), 1
    found = re.fullmatch(r"(?:(\d+)x)?([a-z0-9]+)", text.lower())
    if found is None or found.group(2) not in DEVICES or found.group(1) == "0":
        raise ConfigError(
            f"--cluster {text!r} is not understood. Give a number and a device, such as 8xh100; known: "
            f"{', '.join(DEVICES)}; or `here` for this machine."
        )
    return DEVICES[found.group(2)], int(found.group(1) or 1)


def measure_here(seconds: float = 0.3) -> Device:
    """Matrix products and copies on this machine's own device."""
    from tropd.doctor.cost import free_memory

    where = choose_device("auto")
    dtype = choose_dtype("auto", where)
    a, b = (torch.randn(1024, 1024, device=where).to(dtype) for _ in range(2))
    large = torch.empty(1 << 26, dtype=torch.uint8, device=where)
    products = _rate(lambda: a @ b, seconds, where)
    copies = _rate(lambda: large.clone(), seconds, where)
    return Device(
        name=f"this {where.type}",
        memory=float(free_memory(where) or 0),
        operations=products * 2 * 1024**3,
        bandwidth=copies * 2 * large.numel(),
        reached=REACHED_HERE if where.type == "cpu" else REACHED,
    )


def _rate(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """How often per second."""
    work()
    count, started = 0, time.perf_counter()
    while (passed := time.perf_counter() - started) < seconds or count < 3:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        count += 1
    return count / passed
