"""CPU seconds per token where student and teacher write together, against the student alone and both one after another.

    python benchmarks/joint.py [--repeats 3]

Random models on one thread: a student of 4 layers of width 256, a teacher of 8 layers of width 512.  Every row writes
as many tokens with the same requests.  `together / alone` is what a token costs in units of the student's; (student +
teacher) / student is what two forward passes cost, and what is beyond that is the decoding itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import qwen3
from benchmarks.rollouts import Case, make_requests
from tropd.methods.agreement_stop import Watch
from tropd.methods.decoding import Decoding
from tropd.methods.joint import Blend, Mix, Overwrite
from tropd.objective.trap import Trap
from tropd.rollout.joint import JointEngine
from tropd.rollout.transformers import TransformersEngine
from tropd.types import Completion, Request

CASES = (
    Case("V=151936, B=16", 151_936, 16, (64, 64), 48, None),
    Case("V=2048, B=16", 2_048, 16, (64, 64), 96, None),
)
DECODINGS: dict[str, Decoding] = {
    "reads along": Decoding(),
    "interleaved": Overwrite(top_k=25),
    "mixed_sampling": Mix(alpha=0.2),
    "agreement_stop": Watch(trap=Trap(), threshold=-1.0),
    "blended": Blend(epsilon=0.01),
}

Write = Callable[[list[Request]], list[Completion]]


def sides(case: Case) -> dict[str, Write]:
    student: Any = qwen3(case.vocab_size, width=256, inner=768, layers=4, heads=(4, 2), seed=0).eval()
    teacher: Any = qwen3(case.vocab_size, width=512, inner=1536, layers=8, heads=(8, 4), seed=1).eval()
    own, theirs = (TransformersEngine(model, max_batch=case.num_requests) for model in (student, teacher))
    pair = JointEngine(own, theirs)

    def together(decoding: Decoding) -> Write:
        return lambda requests: pair.write(requests, [request.token_ids for request in requests], decoding)

    return {
        "student": own.generate,
        "teacher": theirs.generate,
        **{name: together(decoding) for name, decoding in DECODINGS.items()},
    }


def measure(case: Case, repeats: int) -> dict[str, float]:
    """CPU seconds per token, medians; the first, unmeasured turn warms everything up."""
    seconds: dict[str, list[float]] = {}
    writes = sides(case)
    for turn in range(repeats + 1):
        requests = make_requests(case, seed=turn) if turn else make_requests(case, seed=0)[:2]
        for name, write in writes.items():
            started = time.process_time()
            number = sum(len(text.token_ids) for text in write(requests))
            if turn:
                seconds.setdefault(name, []).append((time.process_time() - started) / number)
    return {name: statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    for case in CASES:
        median = measure(case, repeats)
        alone, both = median.pop("student"), median.pop("teacher")
        print(f"{case.name}: alone {1 / alone:.0f} tokens/s, (student + teacher) / student {1 + both / alone:.2f}")
        for name, seconds in median.items():
            print(f"    {name:16} {1 / seconds:6.0f} tokens/s, together / alone {seconds / alone:.2f}", flush=True)


if __name__ == "__main__":
    main()
