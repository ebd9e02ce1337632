"""How large everything is: on a GPU what the bars speak of, on a CPU just enough to run every line."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from benchmarks import step
from benchmarks.step import Shape


@dataclass(frozen=True, kw_only=True)
class Sizes:
    device: str
    vocabulary: int
    repeats: int
    head_tokens: int
    head_widths: tuple[int, ...]
    teacher_width: int
    head_tile: int
    lean_tile: tuple[int, int]
    """Tokens and vocabulary of a tile in lean mode."""
    gkd_tokens: int
    matrix_methods: tuple[str, ...]
    """Empty: all."""
    matrix_steps: int
    decode: Shape
    decode_rows: int
    decode_prompt: int
    decode_steps: tuple[int, int]
    """A short and a long answer: the difference is decoding alone."""
    packed: Shape
    packed_tokens: int
    packed_lengths: tuple[int, int]
    """Shortest and longest sequence of the ragged batch."""
    student: Shape
    teacher: Shape
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    stop_every: int
    train_steps: int
    long_steps: int
    long_widths: tuple[int, int]
    """Of the long testbed's teacher and student."""
    long_layers: tuple[int, int]
    long_effort: float
    """Share of the testbed's own supervised training."""

    @property
    def judged(self) -> bool:
        """Whether bars are meant for these sizes."""
        return self.device == "cuda"


_1B7 = Shape(
    hidden_size=2048,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=6144,
    tie_word_embeddings=True,
)
_1B = replace(_1B7, num_hidden_layers=16)
_0B6 = Shape(
    hidden_size=1024,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    intermediate_size=3072,
    tie_word_embeddings=True,
)
_TINY = Shape(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
    tie_word_embeddings=True,
)

CUDA = Sizes(
    device="cuda",
    vocabulary=151_936,
    repeats=5,
    head_tokens=8192,
    head_widths=(2048, 4096),
    teacher_width=2560,
    head_tile=4096,
    lean_tile=(1024, 16_384),
    gkd_tokens=4096,
    matrix_methods=(),
    matrix_steps=2,
    decode=_1B7,
    decode_rows=64,
    decode_prompt=832,
    decode_steps=(16, 128),
    packed=_1B,
    packed_tokens=16_384,
    packed_lengths=(16, 2048),
    student=_0B6,
    teacher=_1B7,
    num_prompts=32,
    prompt_tokens=64,
    new_tokens=512,
    stop_every=192,
    train_steps=200,
    long_steps=100,
    long_widths=(384, 320),
    long_layers=(8, 8),
    long_effort=1.0,
)
CPU = Sizes(
    device="cpu",
    vocabulary=512,
    repeats=1,
    head_tokens=64,
    head_widths=(16, 32),
    teacher_width=24,
    head_tile=32,
    lean_tile=(32, 128),
    gkd_tokens=32,
    matrix_methods=("opd", "tropd"),
    matrix_steps=2,
    decode=_TINY,
    decode_rows=3,
    decode_prompt=20,
    decode_steps=(16, 20),
    packed=_TINY,
    packed_tokens=256,
    packed_lengths=(4, 64),
    student=_TINY,
    teacher=_TINY,
    num_prompts=2,
    prompt_tokens=8,
    new_tokens=16,
    stop_every=16,
    train_steps=2,
    long_steps=1,
    long_widths=(16, 16),
    long_layers=(1, 1),
    long_effort=0.003,
)
SIZES = {"cuda": CUDA, "cpu": CPU}


def make_model(shape: Shape, s: Sizes, dtype: Literal["float32", "bfloat16"] = "bfloat16") -> Any:
    """A random model, made on the device."""
    device = "cuda" if s.device == "cuda" else "cpu"
    return step.make_model(shape, step.Settings(vocabulary=s.vocabulary, dtype=dtype, device=device)).eval()


def seconds(run: Callable[[], Any], s: Sizes) -> float:
    """Wall-clock time of a call, the device's work included."""
    _wait(s)
    start = time.perf_counter()
    run()
    _wait(s)
    return time.perf_counter() - start


def _wait(s: Sizes) -> None:
    if s.device == "cuda":
        torch.cuda.synchronize()


def machine(s: Sizes) -> dict[str, Any]:
    """What was run on what."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count()}
    for name in ("torch", "transformers", "triton", "peft", "trl", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    found["device"] = torch.cuda.get_device_name() if s.device == "cuda" else platform.processor() or "CPU"
    if s.device == "cuda":
        found["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    return found
