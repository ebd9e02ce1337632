"""The vocabulary head: teacher scores, student loss and gradient, against bare matrix products and against TRL.

    python benchmarks/head.py                                   # float32, V = 151,936, H = 256, N = 1024
    python benchmarks/head.py --device cuda --dtype bfloat16 --width 2048 --tokens 8192 --tile 4096

ours   one pass for the teacher (sampled log-probability, top-k), one for the student with TrOPD's loss and gradient
lean   the same with the vocabulary in tiles of --tile-vocab: one more matrix product, workspace flat in V
bare   the matrix products alone: one for the teacher, three for the student, in the same tiles
trl    `_chunked_divergence_loss` of TRL's DistillationTrainer: reverse KL over the whole vocabulary, both heads
gkd    `generalized_jsd_loss` of TRL's GKDTrainer: the same from whole logits (6 GB at the default size)
liger  `LigerFusedLinearJSDLoss` of liger-kernel, not compiled: the same in chunks of 1024 tokens

Sides interleaved in one process, medians.  On a CPU: one thread, CPU seconds, peak resident memory of each side in a
process of its own.  On CUDA: seconds between two events, peak of the allocator above what was held before; the bare
weight gradient is a float32 sum there.  No number of a GPU has been taken with this script yet.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from tropd.methods import TrOPD
from tropd.model.head import Head
from tropd.model.one_pass import fused_loss, read_rows, wanted
from tropd.model.products import add_product_
from tropd.objective.context import Context
from tropd.objective.evidence import Needs, Tokens
from tropd.objective.plan import count

MODULES = {
    "trl": "trl.trainer.distillation_trainer",
    "gkd": "trl.experimental.gkd.gkd_trainer",
    "liger": "liger_kernel.chunked_loss",
}


@dataclass
class Settings:
    vocabulary: int = 151_936
    width: int = 256
    tokens: int = 1024
    top_k: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    tile: int = 256
    tile_vocab: int = 16_384
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: int = 3
    outliers: float = 0.25
    """Share of rows that are outliers, spread evenly.  The teacher's top-k is read for these only (training asks for a
    random eighth of the others too), but for all rows by `lean`."""
    sides: tuple[str, ...] = ("bare", "ours", "lean", "trl", "liger", "gkd")
    only: str = ""
    """Run one side once and print its peak memory (used by the script itself)."""


class Problem:
    """Random hidden states, heads and written tokens."""

    def __init__(self, s: Settings) -> None:
        g = torch.Generator(s.device).manual_seed(0)
        dtype = getattr(torch, s.dtype)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, s.width, generator=g, device=s.device)

        self.settings = s
        self.hidden = normal(s.tokens).to(dtype).requires_grad_()
        self.teacher_hidden = (self.hidden.detach().float() + 0.1 * normal(s.tokens)).to(dtype)
        self.modules = [nn.Linear(s.width, s.vocabulary, bias=False, dtype=dtype, device=s.device) for _ in range(2)]
        weight = (3 * normal(s.vocabulary) / s.width**0.5).to(dtype)
        with torch.no_grad():
            for module in self.modules:
                module.weight.copy_(weight)
        self.heads = [Head(module=m, vocab_size=s.vocabulary) for m in self.modules]
        with torch.no_grad():  # drawn from the student, as in training
            ids = [
                torch.multinomial((self.hidden[i : i + 64] @ weight.t()).float().softmax(-1), 1, generator=g)
                for i in range(0, s.tokens, 64)
            ]
        self.ids_N = torch.cat(ids).squeeze(1)

    def side(self, name: str) -> Callable[[], float]:
        """What to time.  `student` and `frozen` start from scores that are made here; imports are made here too."""
        self.modules[0].weight.requires_grad_(name != "frozen")
        if name in MODULES:
            import_module(MODULES[name])
        if name not in ("student", "frozen"):
            return getattr(self, name)
        tokens = self.score()
        return lambda: self.learn(tokens)

    def ours(self) -> float:
        return self.learn(self.score())

    def lean(self) -> float:
        tile_vocab = self.settings.tile_vocab
        return self.learn(self.score(tile_vocab), tile_vocab)

    def score(self, tile_vocab: int | None = None) -> Tokens:
        s = self.settings
        positions_N = torch.arange(s.tokens, device=s.device)

        def outliers(rows: slice, teacher_logprobs_C: Tensor) -> Tensor:
            return log_ratios(positions_N[rows], s.outliers) < 0

        shape = {"top_k": s.top_k, "tile_vocab": tile_vocab, "top_rows": outliers}
        found = read_rows(self.heads[1], self.teacher_hidden, self.ids_N[:, None], s.tile, **shape)
        return Tokens(
            token_ids_N=self.ids_N,
            authors_N=torch.ones_like(self.ids_N),
            sequences_N=torch.zeros_like(self.ids_N),
            positions_N=positions_N,
            keys_S=torch.tensor([7], device=s.device),
            num_actions_S=torch.tensor([s.tokens], device=s.device),
            teacher_logprobs_N=found["at"][:, 0],
            teacher_topk_ids_NK=found["topk_ids"],
            teacher_topk_logprobs_NK=found["topk"],
            vocab_size=s.vocabulary,
        )

    def learn(self, tokens: Tokens, tile_vocab: int | None = None) -> float:
        s = self.settings
        objective = TrOPD(top_k=s.top_k, trust="threshold", guidance=False).objective
        counts = count(tokens, Context())
        ids_NM, view_of = wanted(tokens, Needs.SAMPLED | Needs.TOPK)

        def judge(rows: slice, logprobs_CM: Tensor) -> Tensor:
            own = logprobs_CM[:, 0].detach()
            part = tokens.rows(rows).with_(student_logprobs_N=own, behavior_logprobs_N=own)
            teacher = (own + log_ratios(part.positions_N, s.outliers)).clamp(max=0.0)
            part = part.with_(teacher_logprobs_N=teacher)
            return objective(part, view_of(logprobs_CM), objective.plan(part, counts=counts)).loss

        return self._descend(fused_loss(self.heads[0], self.hidden, ids_NM, judge, s.tile, tile_vocab))

    @torch.no_grad()
    def bare(self) -> float:
        s = self.settings
        student, teacher = (m.weight for m in self.modules)
        buffer = student.new_empty(s.tile, s.vocabulary)
        summed = torch.float32 if s.device == "cuda" else student.dtype
        hidden_gradient, weight_gradient = torch.empty_like(self.hidden), torch.zeros_like(student, dtype=summed)
        for i in range(0, s.tokens, s.tile):
            rows = slice(i, i + s.tile)
            tile = buffer[: len(self.hidden[rows])]
            torch.mm(self.teacher_hidden[rows], teacher.t(), out=tile)
            torch.mm(self.hidden[rows], student.t(), out=tile)
            torch.mm(tile, student, out=hidden_gradient[rows])
            add_product_(weight_gradient, tile.t(), self.hidden[rows])
        return float(weight_gradient[0, 0])

    def trl(self) -> float:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        loss = _chunked_divergence_loss(
            self.hidden[None],
            self.teacher_hidden[None],
            self.modules[0].weight,
            self.modules[1].weight,
            torch.ones(1, self.settings.tokens, device=self.settings.device),
            beta=1.0,
        )[0]
        return self._descend(loss)

    def gkd(self) -> float:
        from trl.experimental.gkd import GKDTrainer

        student = self.hidden @ self.modules[0].weight.t()
        with torch.no_grad():
            teacher = self.teacher_hidden @ self.modules[1].weight.t()
        return self._descend(GKDTrainer.generalized_jsd_loss(student[None], teacher[None], beta=1.0))

    def liger(self) -> float:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        divergence = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, compiled=False)
        student, teacher = (m.weight for m in self.modules)
        return self._descend(divergence(self.hidden, student, self.teacher_hidden, teacher.detach(), self.ids_N))

    def _descend(self, loss: Tensor) -> float:
        loss.backward()
        self._forget()
        return float(loss.detach())

    def _forget(self) -> None:
        self.hidden.grad = None
        for module in self.modules:
            module.weight.grad = None


def log_ratios(positions_N: Tensor, share: float) -> Tensor:
    """A share of them negative, evenly spread: the outliers of a threshold at 1."""
    outliers_N = ((positions_N + 1) * share).floor() > (positions_N * share).floor()
    return torch.where(outliers_N, -0.5, 0.5)


def timed(side: Callable[[], float], device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        side()
        return time.process_time() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    side()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after) / 1000


def allocated_megabytes(side: Callable[[], float]) -> float:
    """Growth of what PyTorch holds on the GPU while one side runs once."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    side()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_megabytes(side: str, s: Settings) -> float:
    """Growth of the resident set while one side runs once, in a process of its own."""
    flags = [f"--{k}={v}" for k, v in asdict(s).items() if k not in ("only", "sides")]
    command = [sys.executable, __file__, *flags, f"--only={side}"]
    # Else memory that was freed before, and kept by malloc, hides what is taken.
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    out = subprocess.run(command, capture_output=True, text=True, check=True, env=fixed)
    return float(out.stdout.strip().splitlines()[-1])


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    problem = Problem(s)
    if s.only:
        side = problem.side(s.only)
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = resident()
        side()
        return print(_high_water() - before)
    times: dict[str, list[float]] = {side: [] for side in s.sides}
    for repeat in range(s.repeats + 1):  # the first warms up
        for side in s.sides:
            seconds = timed(problem.side(side), s.device)
            if repeat:
                times[side].append(seconds)
    rows = {side: {"seconds": statistics.median(t), "megabytes": memory(problem, side)} for side, t in times.items()}
    where = "1 thread" if s.device == "cpu" else torch.cuda.get_device_name()
    print(f"V={s.vocabulary} H={s.width} N={s.tokens} k={s.top_k} {s.dtype}, {where}, torch {torch.__version__}")
    for side, row in rows.items():
        report(side, row, rows, times[side])
    print(json.dumps({"settings": asdict(s), "sides": rows}))


def memory(problem: Problem, side: str) -> float:
    if problem.settings.device == "cuda":
        return allocated_megabytes(problem.side(side))
    return peak_megabytes(side, problem.settings)


def report(side: str, row: dict[str, float], rows: dict[str, dict[str, float]], seconds: list[float]) -> None:
    """One line: its time and memory, then against the bare products and against ours, where those were run."""
    line = f"{side:7} {row['seconds']:9.4f} s ({min(seconds):.4f}..{max(seconds):.4f})  {row['megabytes']:7.0f} MB"
    if "bare" in rows:
        line += f"   bare / it {rows['bare']['seconds'] / row['seconds']:5.2f}"
    if "ours" in rows:
        line += f"   time / ours {row['seconds'] / rows['ours']['seconds']:5.2f}"
        line += f"   memory ours / it {rows['ours']['megabytes'] / max(row['megabytes'], 1e-9):.3f}"
    print(line)


def _high_water() -> float:
    with open("/proc/self/status") as file:
        line = next(x for x in file if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(tyro.cli(Settings))
