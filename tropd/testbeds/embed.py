"""Makes the models that come with the package: `python -m tropd.testbeds.embed [FOLDER]`, a minute on one core.

One teacher, a student with a mild and one with a hard mismatch, in half precision, with their prompts and measurements
of the stored weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from tropd.errors import ConfigError
from tropd.testbeds.beds import TESTBEDS
from tropd.testbeds.pair import EMBEDDED, Pair, load, make_pair, measure, save
from tropd.testbeds.task import Testbed


def embed(beds: Sequence[Testbed], seed: int, folder: Path) -> None:
    """Write pairs of several testbeds with one teacher; replaces the files in `folder`."""
    if folder.exists() and not (folder / "facts.json").exists():
        raise ConfigError(f"{folder} holds something else than models that come with a package. Name a new folder.")
    with TemporaryDirectory() as work:
        pairs: list[Pair] = []
        for bed in beds:
            teacher = pairs[0].teacher if pairs else None
            pairs.append(make_pair(bed, seed, Path(work) / bed.name, teacher=teacher))
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for path in (pairs[0].prompts, pairs[0].held_out):
            shutil.copy(path, folder)
        facts = _store(beds[0], pairs[0].teacher, folder / "teacher", "teacher")
        said = {
            bed.name: facts | _store(bed, pair.student, folder / f"student-{_manner(bed)}", "student")
            for bed, pair in zip(beds, pairs, strict=True)
        }
    (folder / "facts.json").write_text(json.dumps(said, indent=2) + "\n")


def _store(bed: Testbed, source: Path, target: Path, whose: str) -> dict[str, float]:
    save(load(source), bed.task, target, torch.float16)
    (target / "model.safetensors").chmod(0o644)
    measured = measure(bed, load(target), target.parent)
    return {f"{whose}_{name}": value for name, value in measured.items()}


def _manner(bed: Testbed) -> str:
    """The last part of a name: mild, hard."""
    return bed.name.rpartition("-")[2]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the models that come with the package.")
    parser.add_argument("folder", nargs="?", type=Path, default=EMBEDDED, help="by default inside the package")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # the order of sums, and with it the last bit, is that of one thread
    embed([TESTBEDS["nano-mild"], TESTBEDS["nano-hard"]], 0, asked.folder)
    size = sum(path.stat().st_size for path in asked.folder.rglob("*") if path.is_file())
    print(f"{asked.folder}: {size / 1e3:.0f} kB")
    print((asked.folder / "facts.json").read_text())


if __name__ == "__main__":
    main()
