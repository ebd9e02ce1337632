"""One handover of weights through a disk against one through memory, as `rollout.weights_folder` chooses.

    python benchmarks/handover.py [--repeats 5] [--disk .] [--memory /dev/shm]

A random model is written as for a vLLM server (`export_untied`), and a process that this one has started reads every
byte of it.  Both folders take turns; the table shows medians of wall-clock seconds.  A server does more with what it
reads, and a file that was just written is read from the page cache: the difference is in the writing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.models import qwen3
from tropd.checkpoints.export import export_untied


def read(orders: Connection) -> None:
    """The side of the server: reads the folder that it is told, and says how many bytes that were."""
    torch.set_num_threads(1)
    while folder := orders.recv():
        tensors = [load_file(file) for file in sorted(Path(folder).glob("*.safetensors"))]
        orders.send(sum(x.clone().nbytes for part in tensors for x in part.values()))


def compare(disk: Path, memory: Path, repeats: int) -> dict[str, Any]:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    model = qwen3(32_768, width=768, inner=2_304, layers=5, heads=(12, 4), tied=True)
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=read, args=(there,), daemon=True)
    server.start()
    found: dict[str, dict[str, list[float]]] = {}
    size = 0
    with tempfile.TemporaryDirectory(dir=disk) as slow, tempfile.TemporaryDirectory(dir=memory) as fast:
        for turn in range(repeats + 1):
            for side, folder in (("disk", Path(slow) / "w"), ("memory", Path(fast) / "w")):
                start = time.perf_counter()
                export_untied(model, tokenizer, folder)
                written = time.perf_counter()
                here.send(str(folder))
                size = here.recv()
                done = time.perf_counter()
                if turn:  # the first one warms up
                    times = found.setdefault(side, {"write": [], "read": [], "both": []})
                    for phase, seconds in (
                        ("write", written - start),
                        ("read", done - written),
                        ("both", done - start),
                    ):
                        times[phase].append(seconds)
        here.send("")
    server.join()
    medians = {side: {p: statistics.median(x) for p, x in times.items()} for side, times in found.items()}
    return {"bytes": size, **medians, "ratio": medians["disk"]["both"] / medians["memory"]["both"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--disk", type=Path, default=Path())
    parser.add_argument("--memory", type=Path, default=Path("/dev/shm"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = compare(asked.disk, asked.memory, asked.repeats)
    table = Table("folder", "written, s", "read, s", "both, s")
    for side in ("disk", "memory"):
        table.add_row(side, *(f"{found[side][phase]:.2f}" for phase in ("write", "read", "both")))
    Console().print(table)
    print(f"{found['bytes'] / 1e6:.0f} MB; disk / memory = {found['ratio']:.2f}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
