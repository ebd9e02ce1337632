"""One part in a process of its own: `python -m benchmarks.gpu_check.part NAME MODULE DEVICE FOLDER [ITEM ...]`."""

from __future__ import annotations

import json
import os
import sys
import warnings
from importlib import import_module
from pathlib import Path

MODULES = ("checks", "matrix", "heads", "decode", "whole", "packed", "train", "sharded")


def main(name: str, module: str, device: str, folder: Path, items: tuple[str, ...]) -> None:
    if (module, device) == ("checks", "cpu"):
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which transformers may do
    import torch

    from benchmarks.gpu_check.sizes import SIZES, machine
    from benchmarks.gpu_check.table import Table

    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"device cuda was asked for, but torch {torch.__version__} finds none here.")
    if device == "cpu":
        torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=FutureWarning)
    s = SIZES[device]
    (folder / f"{name}.machine.json").write_text(json.dumps(machine(s)))
    table = Table(folder / f"{name}.json")
    run = import_module(f"benchmarks.gpu_check.{module}").run
    extra = (folder,) if module == "train" else ()
    run(s, table, items, *extra)


if __name__ == "__main__":
    name, module, device, folder, *items = sys.argv[1:]
    main(name, module, device, Path(folder), tuple(items))
