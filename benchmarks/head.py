"""The vocabulary head: teacher scores, student loss and gradient, against bare matrix products and against TRL.

    python benchmarks/head.py                                   # float32, V = 151,936, H = 256, N = 1024
    python benchmarks/head.py --dtype bfloat16 --width 1024 --tokens 512

ours   one pass for the teacher (sampled log-probability, top-k), one for the student with TrOPD's loss and gradient
bare   the matrix products alone: one for the teacher, three for the student, in the same tiles
trl    `_chunked_divergence_loss` of TRL's DistillationTrainer: reverse KL over the whole vocabulary, both heads

One thread, CPU seconds, sides interleaved in one process, medians; peak memory of each side in a process of its own.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor, nn

from tropd.methods import TrOPD
from tropd.objective.evidence import Needs, Tokens
from tropd.student.fused import fused_loss, read_rows, wanted
from tropd.student.head import Head


@dataclass
class Settings:
    vocabulary: int = 151_936
    width: int = 256
    tokens: int = 1024
    top_k: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    tile: int = 256
    repeats: int = 3
    sides: tuple[str, ...] = ("bare", "ours", "trl")
    only: str = ""
    """Run one side once and print its peak memory (used by the script itself)."""


class Problem:
    """Random hidden states, heads and written tokens; about a quarter of the rows are outliers."""

    def __init__(self, s: Settings) -> None:
        g = torch.Generator().manual_seed(0)
        dtype = getattr(torch, s.dtype)
        self.settings = s
        self.hidden = torch.randn(s.tokens, s.width, generator=g).to(dtype).requires_grad_()
        noise = torch.randn(s.tokens, s.width, generator=g)
        self.teacher_hidden = (self.hidden.detach().float() + 0.1 * noise).to(dtype)
        self.modules = [nn.Linear(s.width, s.vocabulary, bias=False, dtype=dtype) for _ in range(2)]
        weight = 3 * torch.randn(s.vocabulary, s.width, generator=g) / s.width**0.5
        with torch.no_grad():
            for module in self.modules:
                module.weight.copy_(weight)
        self.heads = [Head(module=m, vocab_size=s.vocabulary) for m in self.modules]
        with torch.no_grad():  # drawn from the student, as in training
            ids = [
                torch.multinomial((self.hidden[i : i + 64] @ weight.to(dtype).t()).float().softmax(-1), 1, generator=g)
                for i in range(0, s.tokens, 64)
            ]
        self.ids_N = torch.cat(ids).squeeze(1)

    def ours(self) -> float:
        s, objective = self.settings, TrOPD(top_k=self.settings.top_k, guidance=False).objective
        found = read_rows(self.heads[1], self.teacher_hidden, self.ids_N[:, None], s.tile, top_k=s.top_k)
        tokens = Tokens(
            token_ids_N=self.ids_N,
            authors_N=torch.ones_like(self.ids_N),
            sequences_N=torch.zeros_like(self.ids_N),
            positions_N=torch.arange(s.tokens),
            keys_S=torch.tensor([7]),
            num_actions_S=torch.tensor([s.tokens]),
            teacher_logprobs_N=found["at"][:, 0],
            teacher_topk_ids_NK=found["topk_ids"],
            teacher_topk_logprobs_NK=found["topk"],
            vocab_size=s.vocabulary,
        )
        counts = objective.plan(tokens.with_(student_logprobs_N=tokens.teacher_logprobs_N)).counts
        ids_NM, view_of = wanted(tokens, Needs.SAMPLED | Needs.TOPK)

        def judge(rows: slice, logprobs_CM: Tensor) -> Tensor:
            view, own = view_of(logprobs_CM), logprobs_CM[:, 0].detach()
            part = tokens.rows(rows).with_(student_logprobs_N=own, behavior_logprobs_N=own)
            return objective(part, view, objective.plan(part, counts=counts)).loss

        loss = fused_loss(self.heads[0], self.hidden, ids_NM, judge, s.tile)
        loss.backward()
        self._forget()
        return float(loss.detach())

    @torch.no_grad()
    def bare(self) -> float:
        s = self.settings
        student, teacher = (m.weight for m in self.modules)
        buffer = torch.empty(s.tile, s.vocabulary, dtype=student.dtype)
        hidden_gradient, weight_gradient = torch.empty_like(self.hidden), torch.zeros_like(student)
        for i in range(0, s.tokens, s.tile):
            rows = slice(i, i + s.tile)
            tile = buffer[: len(self.hidden[rows])]
            torch.mm(self.teacher_hidden[rows], teacher.t(), out=tile)
            torch.mm(self.hidden[rows], student.t(), out=tile)
            torch.mm(tile, student, out=hidden_gradient[rows])
            weight_gradient.addmm_(tile.t(), self.hidden[rows])
        return float(weight_gradient[0, 0])

    def trl(self) -> float:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss

        loss = _chunked_divergence_loss(
            self.hidden[None],
            self.teacher_hidden[None],
            self.modules[0].weight,
            self.modules[1].weight,
            torch.ones(1, self.settings.tokens),
            beta=1.0,
        )[0]
        loss.backward()
        self._forget()
        return float(loss.detach())

    def _forget(self) -> None:
        self.hidden.grad = None
        for module in self.modules:
            module.weight.grad = None


def timed(side: Callable[[], float]) -> float:
    start = time.process_time()
    side()
    return time.process_time() - start


def peak_megabytes(side: str, s: Settings) -> float:
    """Growth of the resident set while one side runs once, in a process of its own."""
    flags = [f"--{k}={v}" for k, v in asdict(s).items() if k not in ("only", "sides")]
    out = subprocess.run(
        [sys.executable, __file__, *flags, f"--only={side}"], capture_output=True, text=True, check=True
    )
    return float(out.stdout.strip().splitlines()[-1])


def resident() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20


def main(s: Settings) -> None:
    torch.set_num_threads(1)
    problem = Problem(s)
    if s.only:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # forget the peak so far
        before = resident()
        getattr(problem, s.only)()
        print(_high_water() - before)
        return
    times: dict[str, list[float]] = {side: [] for side in s.sides}
    for repeat in range(s.repeats + 1):  # the first warms up
        for side in s.sides:
            seconds = timed(getattr(problem, side))
            if repeat:
                times[side].append(seconds)
    rows = {side: {"seconds": statistics.median(t), "megabytes": peak_megabytes(side, s)} for side, t in times.items()}
    base = rows["ours"]
    print(f"V={s.vocabulary} H={s.width} N={s.tokens} k={s.top_k} {s.dtype}, 1 thread, torch {torch.__version__}")
    for side, row in rows.items():
        spread = f"{min(times[side]):.2f}..{max(times[side]):.2f}"
        print(
            f"{side:5} {row['seconds']:7.2f} s ({spread})  {row['megabytes']:7.0f} MB   "
            f"time / ours {row['seconds'] / base['seconds']:5.2f}  "
            f"memory ours / it {base['megabytes'] / row['megabytes']:.3f}"
        )
    print(json.dumps({"settings": asdict(s), "sides": rows}))


def _high_water() -> float:
    with open("/proc/self/status") as file:
        line = next(x for x in file if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(tyro.cli(Settings))
